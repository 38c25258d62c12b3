"""Arithmetic: word problems to equations, to numbers and to choices, and competition mathematics."""

from diablo.tasks.arithmetic.competition import Math, MetaMathQA
from diablo.tasks.arithmetic.equations import Mawps
from diablo.tasks.arithmetic.word_problems import AddSub, Aqua, Gsm8k, Math10k, MawpsCot, MultiArith, SingleEq, Svamp

__all__ = [
    "AddSub",
    "Aqua",
    "Gsm8k",
    "Math",
    "Math10k",
    "Mawps",
    "MawpsCot",
    "MetaMathQA",
    "MultiArith",
    "SingleEq",
    "Svamp",
]
