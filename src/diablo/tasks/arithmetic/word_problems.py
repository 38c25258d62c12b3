"""Word problems whose answer is a number or a choice, worked out in words."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from diablo.data.rows import instruction_row
from diablo.tasks.arithmetic import answers
from diablo.tasks.arithmetic.equations import read_packaged
from diablo.tasks.base import Problem
from diablo.tasks.llm_adapters import AdaptersTask, adapters_source
from diablo.tasks.sources import Source, Split

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_PAPER_TOLERANCE = 1e-3


class NumberTask(answers.ValueTask):
    """A task whose answer is a number. It is kept as text, so that under the strict protocol no digit is lost."""

    max_new_tokens = 512
    measure = "share of right numbers"
    readings = (
        r"the one number that the text calls its answer, in the last place where it does so (behind 'answer is', "
        r"'answer:' or '####', or in \boxed{}); equal in value to six decimals",
        "the first number behind 'The final answer is: ', or else the last one of the text; equal to 0.001",
    )

    def parse(self, text: str) -> Any | None:
        """Strict: the one number that the text calls its answer. Paper: see :func:`answers.paper_number`."""
        return answers.paper_number(text) if self.protocol == "paper" else answers.strict_number(text)

    def is_right(self, parsed: Any, answer: str) -> bool:
        """Whether the two are equal, to six decimals; under the paper's protocol to 1e-3, as in LLM-Adapters."""
        if self.protocol == "paper":
            return abs(parsed - float(answer)) <= _PAPER_TOLERANCE
        return answers.same_value(parsed, answer)


class Gsm8k(NumberTask):
    """GSM8K (Cobbe et al., 2021): grade-school word problems, worked out step by step to a number.

    7,473 problems to train on and 1,319 to test. A training completion is the worked answer without its calculator
    annotations. Its last line, ``#### N`` in the data, reads ``The final answer is: N``.
    """

    name = "gsm8k"
    sizes = (7_473, 1_319)
    licence = "MIT"
    source = Source(
        places=(
            "gsm8k/{split}.jsonl",
            "grade-school-math/grade_school_math/data/{split}.jsonl",
            "gsm8k/main/{split}-*-of-*.parquet",
        ),
        fields={"question": str, "answer": str},
        origin="https://github.com/openai/grade-school-math",
        hub="openai/gsm8k",
        config="main",
    )

    def problem(self, number: int, record: dict[str, Any]) -> Problem | str:
        """The question as the instruction, the worked answer as the response."""
        worked, _, final = record["answer"].rpartition("####")
        answer = _number(final)
        if answer is None:
            return "answer does not end in '#### ' and a number"
        completion = f"{_CALCULATOR.sub('', worked).strip()}\nThe final answer is: {final.strip()}"
        return Problem(instruction_row(number, record["question"].strip(), completion), answer)


class WordProblems(AdaptersTask, NumberTask):
    """A set of word problems in the format of LLM-Adapters (Hu et al., EMNLP 2023)."""

    family = "math"
    numbers: ClassVar[bool] = True
    """Whether an answer may be a number. It may always be one of the task's words."""

    @property
    def allowed(self) -> str:
        """In words for a message, what an answer of a record has to be."""
        return " or ".join([super().allowed] * bool(self.words) + ["a number"] * self.numbers)

    def read_answer(self, answer: str | float) -> str | None:
        """The answer that a record names; None if it is not an answer of this task."""
        return super().read_answer(answer) or (_number(str(answer)) if self.numbers else None)


class Svamp(WordProblems, name="svamp", published="SVAMP", sizes={"test": 1_000}):
    """SVAMP (Patel et al., NAACL 2021): simple word problems, varied so that shallow patterns fail."""


class AddSub(WordProblems, name="addsub", published="AddSub", sizes={"test": 395}):
    """AddSub (Hosseini et al., EMNLP 2014): word problems of additions and subtractions."""


class SingleEq(WordProblems, name="singleeq", published="SingleEq", sizes={"test": 508}):
    """SingleEq (Koncel-Kedziorski et al., TACL 2015): word problems of one equation."""


class MultiArith(WordProblems, name="multiarith", published="MultiArith", sizes={"test": 600}):
    """MultiArith (Roy and Roth, EMNLP 2015): word problems of several steps."""


class Aqua(WordProblems, name="aqua", published="AQuA", words="[A-E]", sizes={"test": 254}):
    """AQuA (Ling et al., ACL 2017): word problems with five choices, A to E."""

    numbers = False
    measure = "share of right letters"
    readings = (
        "the letter that the text calls its answer, in the last place where it does so; of several, none",
        "the first of A to E in the text, wherever it stands",
    )

    def parse(self, text: str) -> str | None:
        """Strict: the letter that the text calls its answer. Paper: see :func:`answers.paper_choice`."""
        return answers.paper_choice(text) if self.protocol == "paper" else answers.strict_choice(text)

    def is_right(self, parsed: str, answer: str) -> bool:
        """The same letter."""
        return parsed == answer


class Math10k(
    WordProblems,
    name="math10k",
    words="[A-E]",
    sizes={"train": 9_919},
    source=adapters_source("math/math_10k.json", "LLM-Adapters/ft-training_set/math_10k.json"),
):
    """Math10K (Hu et al., EMNLP 2023): worked word problems of GSM8K, AQuA and MAWPS, to train on."""

    measure = "share of right numbers and letters"

    def parse(self, text: str) -> Any | None:
        """A letter if the answer begins with one, else a number."""
        if self.protocol == "strict":
            return answers.strict_choice(text) or answers.strict_number(text)
        return super().parse(text)

    def is_right(self, parsed: Any, answer: str) -> bool:
        """The same letter, or an equal number."""
        if answer.isalpha():
            return parsed == answer
        return not (isinstance(parsed, str) and parsed.isalpha()) and super().is_right(parsed, answer)


class MawpsCot(NumberTask):
    """MAWPS put as the paper's protocol puts it: its 238 test problems, answered by a number."""

    name = "mawps_cot"
    splits = ("test",)
    sizes = (238,)
    licence = "MIT"

    def records(self, split: Split) -> list[tuple[int, dict[str, Any]]]:
        """The records of MAWPS."""
        return read_packaged(split)

    def problem(self, number: int, record: dict[str, Any]) -> Problem:
        """The question as the instruction. The completion states the number, since the data has no worked answers."""
        answer = str(record["answer"])
        return Problem(instruction_row(number, record["question"], f"The final answer is: {answer}"), answer)


def _number(text: str) -> str | None:
    """A number of a record as plain digits."""
    text = text.strip().replace(",", "").removeprefix("$")
    try:
        return text if math.isfinite(float(text)) else None
    except ValueError:
        return None
