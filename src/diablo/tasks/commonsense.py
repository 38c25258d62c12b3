"""Commonsense reasoning: questions with given choices, in the format of LLM-Adapters (Hu et al., EMNLP 2023).

A completion reads ``the correct answer is answer2``; the choices are numbered words, or true and false.
"""

from __future__ import annotations

import re
from dataclasses import replace

from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.tasks.base import MultipleChoice, Problem
from diablo.tasks.llm_adapters import AdaptersTask, adapters_source

_CUE = "the correct answer is"


class CommonsenseTask(AdaptersTask, MultipleChoice):
    """A task whose answer is one of a few words.

    The cue is ``the correct answer is``. The paper's protocol takes the first of the words that stands anywhere behind
    the first cue, even as part of a longer word. The strict one takes the whole word right behind the last cue, and no
    other.
    """

    max_new_tokens = 32
    beams = 4
    measure = "share of right choices"
    readings = (
        "the whole word right behind the last 'the correct answer is'",
        "the first of the choices' words anywhere behind the first 'the correct answer is', part of a longer one too",
    )
    family = "commonsense"

    def choices(self, problem: Problem) -> list[Row]:
        """The cue with each word that the answer format, the instruction's last line, allows."""
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


class BoolQ(CommonsenseTask, name="boolq", words="true|false", sizes={"train": 9_427, "test": 3_270}):
    """BoolQ (Clark et al., NAACL 2019): questions that are true or false."""


class Piqa(CommonsenseTask, name="piqa", words="solution[12]", sizes={"train": 16_113, "test": 1_838}):
    """PIQA (Bisk et al., AAAI 2020): which of two solutions reaches a goal."""


class SocialIqa(CommonsenseTask, name="social_i_qa", words="answer[1-3]", sizes={"train": 33_410, "test": 1_954}):
    """Social IQa (Sap et al., EMNLP 2019): what people do and feel, three choices."""


class HellaSwag(CommonsenseTask, name="hellaswag", words="ending[1-4]", sizes={"train": 39_905, "test": 10_042}):
    """HellaSwag (Zellers et al., ACL 2019): which of four endings continues a text."""


class WinoGrande(CommonsenseTask, name="winogrande", words="option[12]", sizes={"train": 63_238, "test": 1_267}):
    """WinoGrande (Sakaguchi et al., AAAI 2020): whom a sentence is about, two choices."""


class ArcEasy(
    CommonsenseTask, name="arc_easy", published="ARC-Easy", words="answer[1-5]", sizes={"train": 2_251, "test": 2_376}
):
    """ARC, easy set (Clark et al., 2018): science questions of school exams."""


class ArcChallenge(
    CommonsenseTask,
    name="arc_challenge",
    published="ARC-Challenge",
    words="answer[1-5]",
    sizes={"train": 1_119, "test": 1_172},
):
    """ARC, challenge set (Clark et al., 2018): the questions that retrieval and word statistics fail on."""


class OpenBookQA(CommonsenseTask, name="openbookqa", words="answer[1-4]", sizes={"train": 4_957, "test": 500}):
    """OpenBookQA (Mihaylov et al., EMNLP 2018): elementary science, four choices."""


class Commonsense170k(
    CommonsenseTask,
    name="commonsense170k",
    words="true|false|(?:solution|answer|ending|option)[1-5]",
    sizes={"train": 170_420},
    source=adapters_source(
        "commonsense/commonsense_170k.json",
        "LLM-Adapters/ft-training_set/commonsense_170k.json",
        "commonsense_170k/data/{split}-*-of-*.parquet",
        hub="zwhe99/commonsense_170k",
    ),
):
    """Commonsense-170K (Hu et al., EMNLP 2023): the training sets of all eight tasks in one."""
