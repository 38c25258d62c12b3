"""Word problems whose answer is a number or a choice, worked out in words."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from diablo.data.rows import instruction_row
from diablo.tasks.arithmetic import answers
from diablo.tasks.arithmetic.equations import read_packaged
from diablo.tasks.base import Problem
from diablo.tasks.sources import LLM_ADAPTERS, Source, Split, malformed, read_records

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_PAPER_TOLERANCE = 1e-3


class NumberTask(answers.ValueTask):
    """A task whose answer is a number, which is kept as text: under the strict protocol no digit is lost."""

    max_new_tokens = 512
    measure = "share of right numbers"

    def parse(self, text: str) -> Any | None:
        """Strict: the one number that the text calls its answer. Paper: see :func:`answers.paper_number`."""
        return answers.paper_number(text) if self.protocol == "paper" else answers.strict_number(text)

    def is_right(self, parsed: Any, answer: str) -> bool:
        """Equal in value, to six decimals; under the paper's protocol to 1e-3, as LLM-Adapters has it."""
        if self.protocol == "paper":
            return abs(parsed - float(answer)) <= _PAPER_TOLERANCE
        return answers.same_value(parsed, answer)


class Gsm8k(NumberTask):
    """GSM8K (Cobbe et al., 2021): grade-school word problems, worked out step by step to a number.

    7,473 problems to train on and 1,319 to test. A training completion is the worked answer without its calculator
    annotations; its last line, ``#### N`` in the data, reads ``The final answer is: N``.
    """

    name = "gsm8k"
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

    def problems(self, split: Split) -> list[Problem]:
        """The question as the instruction, the worked answer as the response."""
        return [self._problem(split, *numbered) for numbered in read_records(self.source, split, self.folder)]

    def _problem(self, split: Split, number: int, record: dict[str, Any]) -> Problem:
        worked, _, final = record["answer"].rpartition("####")
        answer = _number(final)
        if answer is None:
            raise malformed(self.name, split, number, "answer does not end in '#### ' and a number")
        completion = f"{_CALCULATOR.sub('', worked).strip()}\nThe final answer is: {final.strip()}"
        return Problem(instruction_row(number, record["question"].strip(), completion), answer)


def _adapters_source(own: str, published: str) -> Source:
    return Source(
        places=(own, f"LLM-Adapters/{published}"),
        fields={"instruction": str, "output": str, "answer": (str, int, float)},
        origin=LLM_ADAPTERS,
    )


class AdaptersTask(NumberTask):
    """A set of word problems in the format of LLM-Adapters (Hu et al., EMNLP 2023)."""

    source: ClassVar[Source]
    splits: ClassVar[tuple[Split, ...]] = ("test",)

    def problems(self, split: Split) -> list[Problem]:
        """The instruction, and the output as its response."""
        problems = []
        for number, record in read_records(self.source, split, self.folder):
            answer = self.read_answer(record["answer"])
            if answer is None:
                raise malformed(self.name, split, number, f"answer is {record['answer']!r}; it cannot be read")
            row = instruction_row(number, record["instruction"].strip(), record["output"].strip())
            problems.append(Problem(row, answer))
        return problems

    def read_answer(self, answer: str | float) -> str | None:
        """The answer that a record names; None where it is none of this task's."""
        return _number(str(answer))


class Svamp(AdaptersTask):
    """SVAMP (Patel et al., NAACL 2021): simple word problems, varied so that shallow patterns fail."""

    name = "svamp"
    source = _adapters_source("math/SVAMP.{split}.json", "dataset/SVAMP/{split}.json")


class AddSub(AdaptersTask):
    """AddSub (Hosseini et al., EMNLP 2014): word problems of additions and subtractions."""

    name = "addsub"
    source = _adapters_source("math/AddSub.{split}.json", "dataset/AddSub/{split}.json")


class SingleEq(AdaptersTask):
    """SingleEq (Koncel-Kedziorski et al., TACL 2015): word problems of one equation."""

    name = "singleeq"
    source = _adapters_source("math/SingleEq.{split}.json", "dataset/SingleEq/{split}.json")


class MultiArith(AdaptersTask):
    """MultiArith (Roy and Roth, EMNLP 2015): word problems of several steps."""

    name = "multiarith"
    source = _adapters_source("math/MultiArith.{split}.json", "dataset/MultiArith/{split}.json")


class Aqua(AdaptersTask):
    """AQuA (Ling et al., ACL 2017): word problems with five choices, A to E."""

    name = "aqua"
    measure = "share of right letters"
    source = _adapters_source("math/AQuA.{split}.json", "dataset/AQuA/{split}.json")

    def parse(self, text: str) -> str | None:
        """Strict: the letter that the text calls its answer. Paper: see :func:`answers.paper_choice`."""
        return answers.paper_choice(text) if self.protocol == "paper" else answers.strict_choice(text)

    def is_right(self, parsed: str, answer: str) -> bool:
        """The same letter."""
        return parsed == answer

    def read_answer(self, answer: str | float) -> str | None:
        """A letter from A to E."""
        return answer if isinstance(answer, str) and re.fullmatch("[A-E]", answer) else None


class Math10k(AdaptersTask):
    """Math10K (Hu et al., EMNLP 2023): worked word problems of GSM8K, AQuA and MAWPS, to train on."""

    name = "math10k"
    splits = ("train",)
    measure = "share of right numbers and letters"
    source = _adapters_source("math/math_10k.json", "ft-training_set/math_10k.json")

    def parse(self, text: str) -> Any | None:
        """A letter where the answer begins with one, else a number."""
        if self.protocol == "strict":
            return answers.strict_choice(text) or answers.strict_number(text)
        return super().parse(text)

    def is_right(self, parsed: Any, answer: str) -> bool:
        """The same letter, or an equal number."""
        if answer.isalpha():
            return parsed == answer
        return not (isinstance(parsed, str) and parsed.isalpha()) and super().is_right(parsed, answer)

    def read_answer(self, answer: str | float) -> str | None:
        """A letter from A to E, or a number."""
        if isinstance(answer, str) and re.fullmatch("[A-E]", answer):
            return answer
        return _number(str(answer))


class MawpsCot(NumberTask):
    """MAWPS put as the paper's protocol puts it: its 238 test problems, answered by a number."""

    name = "mawps_cot"
    splits = ("test",)

    def problems(self, split: Split) -> list[Problem]:
        """The question as the instruction; the data has no worked answers, and so the completion states the number."""
        return [
            Problem(
                instruction_row(number, record["question"], f"The final answer is: {record['answer']}"),
                str(record["answer"]),
            )
            for number, record in read_packaged(split)
        ]


def _number(text: str) -> str | None:
    """A number of a record as plain digits."""
    text = text.strip().replace(",", "").removeprefix("$")
    try:
        return text if math.isfinite(float(text)) else None
    except ValueError:
        return None
