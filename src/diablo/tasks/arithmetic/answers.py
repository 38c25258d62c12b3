r"""How the answer is read from a worked solution: the number, the choice or the expression that it ends in.

Each has two readings. The strict one takes only what the text itself calls its answer, in the last place where it does
so. It compares by value, with math-verify (github.com/huggingface/Math-Verify). The paper's reading (``paper_...``) is
that of the authors' scripts and of those that they build on, so that figures can be compared with theirs.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from diablo.errors import UserError
from diablo.tasks.arithmetic.latex import normalise_latex
from diablo.tasks.base import Protocol, RecordTask

_CUE = re.compile(r"\banswer(?:\*\*)?\s*(?:\bis\b\s*:?|:)|####", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""(?<![\w.])                                  # not the end of a word or of another number
    (?P<sign>[-+]\s?)?
    (?:(?P<whole>\d+)\s+(?=\d+\s?/))?                # 3 1/2
    (?P<number>{_DECIMAL}(?:e[-+]?\d{{1,2}})?)
    (?:\s?/\s?(?P<divisor>{_DECIMAL}))?
    (?!\d|\.\d|e[-+]?\d)                             # the whole of the number
    (?P<percent>\s?(?:%|percent\b))?
    (?:\s?(?P<scale>{"|".join(_SCALES)})\b)?""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
_UNIT_EXPONENT = re.compile(r"(?<=[A-Za-z])(?<!\d[eE])\s?\^?\s?\{?[23²³]\}?(?![\w.])")
_NOT_A_VALUE = re.compile(r"[\d²³^*\u00d7·+÷√\\]|\bnot\b|n't\b")
_SEVERAL = re.compile(r"\b(?:or|and)\b|[,;]")
_LATEX_TO_PLAIN = (
    (re.compile(r"\\[()\[\]!,;: ]|\*\*"), ""),
    (re.compile(r"\\(?:left|right|quad)\b|\\?[$€£¥]"), " "),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|boxed)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))"), ""),
)
SECONDS = 5
"""The most time that a formula is read or compared for."""
_MINUS_SIGNS = str.maketrans("\u2212\u2013\u2012\ufe63\uff0d", "-" * 5)

_CHOICE = re.compile(r"\W*(?:(?:option|choice)\s+)?\(?([A-E])(?!\w)\)?")
_ANOTHER_CHOICE = re.compile(r"\s*(?:,|/|or\b|and\b)\s*(?:option\s+|choice\s+)?\(?[A-E](?!\w)")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")

_PAPER_CUE = "The final answer is: "
_PAPER_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)
_PAPER_EXPRESSION_CUE = "The answer is: "


class ValueTask(RecordTask):
    """A task whose answers are compared by value under the strict protocol.

    Args:
        folder: a local folder of datasets.
        protocol: how answers are read.

    Raises:
        UserError: the strict protocol needs math-verify, which is not installed.
    """

    def __init__(self, *, folder: Path | None = None, protocol: Protocol = "strict") -> None:
        super().__init__(folder=folder, protocol=protocol)
        if protocol == "strict" and importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "The strict protocol compares answers with math-verify, which is not installed: pip install "
                "'diablo-peft[answers]', or choose the protocol paper."
            )


def stated_answer(text: str) -> str | None:
    r"""What a text calls its answer, as it stands there.

    The cues are ``answer is``, ``answer:`` and ``####``, and the last one counts. If there is a ``\boxed{}`` behind it,
    or anywhere in a text without a cue, the last one is the answer. Otherwise the answer is the first line behind the
    cue that is not blank.

    Returns:
        The answer, or None if there is no cue, or nothing behind it.
    """
    cues = list(_CUE.finditer(text))
    behind = text[cues[-1].end() :] if cues else text
    boxed = last_boxed(behind)
    if boxed is not None or not cues:
        return boxed
    answer, *more = behind.strip().splitlines() or [""]
    for line in more:
        if answer.count(r"\begin{") <= answer.count(r"\end{"):
            break
        answer += "\n" + line
    return answer.strip() or None


def last_boxed(text: str) -> str | None:
    r"""The contents of the last ``\boxed{...}`` of a text, up to the brace that closes it."""
    _, command, behind = text.rpartition(r"\boxed{")
    depth = 1 if command else 0
    for position, character in enumerate(behind):
        if not (position and behind[position - 1] == "\\"):
            depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return (command and behind[:position].strip()) or None
    return None


def strict_number(text: str) -> str | None:
    """The one number that a text calls its answer, as LaTeX for :func:`same_value`.

    It understands signs, thousands' commas, decimals, fractions and mixed numbers, exponents, percent, currencies,
    units and scale words, in plain text or LaTeX. Two numbers are no answer, and neither is an open sum. Of
    ``3 * 6 = 18`` the right-hand side counts.
    """
    stated = stated_answer(text)
    return read_number(stated) if stated is not None else None


def read_number(text: str) -> str | None:
    """The one number that stands in a short text, as LaTeX; None if there is none, or several."""
    plain = _SENTENCE_END.split(_to_plain(text), maxsplit=1)[0].partition("\n")[0]
    if "=" in plain and _SEVERAL.search(plain):
        return None
    plain = _UNIT_EXPONENT.sub("", plain.rpartition("=")[2])
    found = _QUANTITY.search(plain)
    if found is None or _NOT_A_VALUE.search(plain[: found.start()] + plain[found.end() :]):
        return None
    try:
        value = Fraction(found["number"]) / Fraction(found["divisor"] or 1) + Fraction(found["whole"] or 0)
    except ZeroDivisionError:
        return None
    value *= _SCALES[found["scale"].lower()] if found["scale"] else 1
    sign = "-" if (found["sign"] or "").strip() == "-" and value else ""
    return f"{sign}{value}" + (r"\%" if found["percent"] else "")


def _to_plain(text: str) -> str:
    text = text.translate(_MINUS_SIGNS)
    text = "".join(
        # A vulgar fraction such as one half is spelt out, and separated from a whole number before it.
        " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
        if unicodedata.decomposition(character).startswith("<fraction>")
        else character
        for character in text
    )
    for pattern, plain in _LATEX_TO_PLAIN:
        text = pattern.sub(plain, text)
    return text


def strict_choice(text: str) -> str | None:
    """The letter from A to E that a text calls its answer: ``C``, ``(C)``, ``C) 12``; None for ``C or D``."""
    stated = stated_answer(text)
    plain = _to_plain(stated) if stated is not None else ""
    found = _CHOICE.match(plain)
    if found is None or _ANOTHER_CHOICE.match(plain, found.end()):
        return None
    return found[1]


def strict_expression(text: str) -> str | None:
    """The mathematical expression that a text calls its answer, as LaTeX for :func:`same_value`."""
    stated = stated_answer(text)
    if stated is None:
        return None
    expression = _SENTENCE_END.split(stated.strip(), maxsplit=1)[0].strip().strip("$").strip()
    expression = re.sub(r"^\\[(\[]|\\[)\]]$", "", expression).strip()
    return expression or None


@lru_cache(maxsize=4096)
def _parsed(latex: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    # In math mode a word would be a product of its letters, equal to every anagram.
    latex = rf"\text{{{latex}}}" if _WORDS.fullmatch(latex) else latex
    return tuple(parse(f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=_time_limit()))


def same_value(given: str, right: str) -> bool:
    """Whether two answers in LaTeX are equal: in writing, up to layout, or in value, to six decimals."""
    from math_verify import verify

    if normalise_latex(given) == normalise_latex(right):
        return True
    return verify(list(_parsed(right)), list(_parsed(given)), timeout_seconds=_time_limit())


def _time_limit() -> int | None:
    """:data:`SECONDS`, or None for no limit.

    math-verify keeps time by a signal, which only the main thread receives.
    """
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def paper_number(text: str) -> float | None:
    """The first number behind ``The final answer is:``, or else the last one of the text.

    The rule with the cue is that of the authors' script for GSM8K. The rule without it is that of LLM-Adapters for the
    other word problems.
    """
    text = text.replace(",", "")
    behind = text.partition(_PAPER_CUE)[2]
    numbers = _PAPER_NUMBER.findall(behind)[:1] or _PAPER_NUMBER.findall(text)[-1:]
    return float(numbers[0]) if numbers else None


def paper_choice(text: str) -> str | None:
    """The first capital letter from A to E in the text, wherever it stands: the rule of LLM-Adapters for AQuA."""
    found = re.search("[A-E]", text)
    return found[0] if found else None


def paper_expression(text: str) -> str | None:
    """The text behind the last ``The answer is:``, up to the full stop that ends its line, normalised."""
    _, cue, behind = text.rpartition(_PAPER_EXPRESSION_CUE)
    if not cue:
        return None
    answer = behind.partition(".\n")[0].strip().removesuffix(".")
    return normalise_latex(answer) or None
