"""Competition mathematics, whose answers are LaTeX expressions."""

from __future__ import annotations

from typing import Any

from diablo.data.rows import instruction_row
from diablo.tasks.arithmetic import answers
from diablo.tasks.arithmetic.latex import normalise_latex
from diablo.tasks.base import Problem
from diablo.tasks.sources import Source


class ExpressionTask(answers.ValueTask):
    """A task whose answer is an expression in LaTeX."""

    max_new_tokens = 1024
    measure = "share of right expressions"
    readings = (
        "the expression that the text calls its answer, in the last place where it does so; equal in value",
        "the text behind the last 'The answer is: '; the same after spellings of LaTeX are levelled",
    )

    def parse(self, text: str) -> str | None:
        """Strict: the expression that the text calls its answer. Paper: see :func:`answers.paper_expression`."""
        return answers.paper_expression(text) if self.protocol == "paper" else answers.strict_expression(text)

    def is_right(self, parsed: str, answer: str) -> bool:
        """Strict: equal in value. Paper: the same text after the normalisation of LaTeX."""
        if self.protocol == "paper":
            return parsed == normalise_latex(answer)
        return answers.same_value(parsed, answer)


class Math(ExpressionTask):
    """MATH (Hendrycks et al., NeurIPS 2021): the 5,000 test problems of competition mathematics."""

    name = "math"
    splits = ("test",)
    sizes = (5_000,)
    licence = "MIT"
    source = Source(
        places=(
            "math/MATH.{split}.jsonl",
            "MATH/{split}/*/*.json",
            "MATH-lighteval/data/{split}-*-of-*.parquet",
        ),
        fields={"problem": str, "solution": str},
        origin="https://github.com/hendrycks/math",
        hub="DigitalLearningGmbH/MATH-lighteval",
    )

    def problem(self, number: int, record: dict[str, Any]) -> Problem | str:
        r"""The problem as the instruction. Its answer stands in the solution's last ``\boxed{}``."""
        answer = answers.last_boxed(record["solution"])
        if answer is None:
            return r"solution has no \boxed{} answer"
        completion = f"{record['solution'].strip()}\nThe answer is: {answer}"
        return Problem(instruction_row(number, record["problem"].strip(), completion), answer)


class MetaMathQA(ExpressionTask):
    """MetaMathQA (Yu et al., ICLR 2024): problems made from GSM8K's and MATH's training sets, to train on."""

    name = "metamathqa"
    splits = ("train",)
    sizes = (395_000,)
    licence = "MIT"
    source = Source(
        places=("math/MetaMathQA-395K.json", "MetaMathQA/MetaMathQA-395K.json"),
        fields={"query": str, "response": str},
        origin="https://huggingface.co/datasets/meta-math/MetaMathQA",
        hub="meta-math/MetaMathQA",
    )

    def problem(self, number: int, record: dict[str, Any]) -> Problem | str:
        """The query as the instruction, and the response, which ends in ``The answer is: ...``."""
        answer = answers.stated_answer(record["response"])
        if answer is None:
            return "response names no answer"
        return Problem(instruction_row(number, record["query"].strip(), record["response"]), answer)
