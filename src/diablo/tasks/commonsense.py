"""Commonsense reasoning: questions with given choices, in the format of LLM-Adapters (Hu et al., EMNLP 2023).

A completion reads ``the correct answer is answer2``; the choices are numbered words, or true and false.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

from diablo.data.rows import Row, instruction_row
from diablo.errors import UserError
from diablo.tasks.base import MultipleChoice, Problem
from diablo.tasks.sources import LLM_ADAPTERS, Source, Split, malformed, read_records

_CUE = "the correct answer is"


def _source(*places: str, hub: str | None = None) -> Source:
    fields = {"instruction": str, "output": str, "answer": str}
    return Source(places=places, fields=fields, origin=LLM_ADAPTERS, hub=hub)


def _splits_of(name: str) -> Source:
    return _source(f"commonsense/{name}.{{split}}.json", f"LLM-Adapters/dataset/{name}/{{split}}.json")


class CommonsenseTask(MultipleChoice):
    """A task whose answer is one of a few words.

    The paper's protocol takes the first of the words that stands anywhere behind the first ``the correct answer is``,
    be it part of a longer one. The strict one takes the whole word right behind the last cue, and no other.
    """

    max_new_tokens = 32
    beams = 4
    measure = "share of right choices"
    source: ClassVar[Source]
    words: ClassVar[str]
    """A regular expression of the answers."""

    def problems(self, split: Split) -> list[Problem]:
        """The question with its choices as the instruction, ``the correct answer is ...`` as the response."""
        problems = []
        for number, record in read_records(self.source, split, self.folder):
            answer = record["answer"]
            if not re.fullmatch(self.words, answer):
                raise malformed(self.name, split, number, f"answer is {answer!r}, not one of {self.words}")
            row = instruction_row(number, record["instruction"].strip(), record["output"].strip())
            problems.append(Problem(row, answer))
        return problems

    def choices(self, problem: Problem) -> list[Row]:
        """``the correct answer is`` with each word that the instruction's last line, the answer format, allows."""
        listed = re.search(r"Answer format: (\S+)\s*$", problem.row.user)
        words = listed[1].split("/") if listed else []
        if problem.answer not in words:
            raise UserError(
                f"task {self.name}: row {problem.row.number} must end with 'Answer format:' and its choices, "
                f"{problem.answer!r} among them, such as answer1/answer2."
            )
        return [replace(problem.row, completion=f"{_CUE} {word}") for word in words]

    def parse(self, text: str) -> str | None:
        """The word that the text calls the correct answer."""
        if self.protocol == "paper":
            found = re.search(self.words, text.partition(_CUE)[2])
            return found[0] if found else None
        behind = re.split(_CUE, text, flags=re.IGNORECASE)
        found = re.match(rf"[\s:*'\"(]*({self.words})(?![\w/]|\s*(?:or|and)\b)", behind[-1], re.IGNORECASE)
        return found[1].lower() if found and len(behind) > 1 else None

    def is_right(self, parsed: str, answer: str) -> bool:
        """The same word."""
        return parsed == answer


class BoolQ(CommonsenseTask):
    """BoolQ (Clark et al., NAACL 2019): questions that are true or false."""

    name = "boolq"
    words = "true|false"
    source = _splits_of("boolq")


class Piqa(CommonsenseTask):
    """PIQA (Bisk et al., AAAI 2020): which of two solutions reaches a goal."""

    name = "piqa"
    words = "solution[12]"
    source = _splits_of("piqa")


class SocialIqa(CommonsenseTask):
    """Social IQa (Sap et al., EMNLP 2019): what people do and feel, three choices."""

    name = "social_i_qa"
    words = "answer[1-3]"
    source = _splits_of("social_i_qa")


class HellaSwag(CommonsenseTask):
    """HellaSwag (Zellers et al., ACL 2019): which of four endings continues a text."""

    name = "hellaswag"
    words = "ending[1-4]"
    source = _splits_of("hellaswag")


class WinoGrande(CommonsenseTask):
    """WinoGrande (Sakaguchi et al., AAAI 2020): whom a sentence is about, two choices."""

    name = "winogrande"
    words = "option[12]"
    source = _splits_of("winogrande")


class ArcEasy(CommonsenseTask):
    """ARC, easy set (Clark et al., 2018): science questions of school exams."""

    name = "arc_easy"
    words = "answer[1-5]"
    source = _splits_of("ARC-Easy")


class ArcChallenge(CommonsenseTask):
    """ARC, challenge set (Clark et al., 2018): the questions that retrieval and word statistics fail on."""

    name = "arc_challenge"
    words = "answer[1-5]"
    source = _splits_of("ARC-Challenge")


class OpenBookQA(CommonsenseTask):
    """OpenBookQA (Mihaylov et al., EMNLP 2018): elementary science, four choices."""

    name = "openbookqa"
    words = "answer[1-4]"
    source = _splits_of("openbookqa")


class Commonsense170k(CommonsenseTask):
    """Commonsense-170K (Hu et al., EMNLP 2023): the training sets of all eight tasks in one."""

    name = "commonsense170k"
    splits = ("train",)
    words = "true|false|(?:solution|answer|ending|option)[1-5]"
    source = _source(
        "commonsense/commonsense_170k.json",
        "LLM-Adapters/ft-training_set/commonsense_170k.json",
        "commonsense_170k/data/{split}-*-of-*.parquet",
        hub="zwhe99/commonsense_170k",
    )
