"""Rows for preference objectives, chosen from a model's right and wrong answers to problems; imports no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from diablo.errors import UserError, did_you_mean
from diablo.models.folders import adapter_folder, base_model_of, is_adapter
from diablo.tasks import Problem, Task

if TYPE_CHECKING:
    from diablo.scoring.generation import Answer

RowFormat = Literal["pairs", "labels", "completions"]
ROW_FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)
OBJECTIVES: dict[RowFormat, str | None] = {"pairs": "dpo", "labels": "kto", "completions": None}
"""What the rows of each format are trained with; None where that is supervised training."""


def row_format(name: str) -> RowFormat:
    """The format of that name.

    Raises:
        UserError: there is no such format.
    """
    if name not in ROW_FORMATS:
        raise UserError(
            f"--format: found {name!r}; allowed: {', '.join(ROW_FORMATS)}.{did_you_mean(name, ROW_FORMATS)}"
        )
    return name


@dataclass(frozen=True)
class Choice:
    """Which rows the answers to a problem make.

    Attributes:
        form: ``"pairs"`` puts a right answer beside a wrong one, ``"labels"`` says of each answer whether it is right,
            and ``"completions"`` takes the right answers alone.
        pairs_per_problem: the most pairs of a problem.
        gold: whether the task's own completion stands in where a problem has no right answer.
        seed: chooses the pairs.
    """

    form: RowFormat = "pairs"
    pairs_per_problem: int = 1
    gold: bool = False
    seed: int = 0

    def check(self, samples: int) -> None:
        """Check that rows can be chosen from so many answers to each problem.

        Raises:
            UserError: they are too few for pairs.
        """
        if self.form == "pairs" and samples < 2 and not self.gold:
            raise UserError(
                f"--samples: found {samples}, of which no pair can be made; give at least 2, or --gold, which pairs a "
                "wrong answer with the task's own."
            )


@dataclass(frozen=True)
class Tally:
    """What became of the answers to problems. Each answer is right, wrong or left out.

    Attributes:
        problems: number of problems.
        answers: number of answers.
        right: those that are right.
        wrong: those that are wrong.
        left_out: those that are empty or were cut off at the limit on their length.
        all_right: problems with right answers and no wrong one.
        none_right: problems without a right answer.
        some_right: problems with right and wrong answers.
        gold: problems for which the task's own completion stands in.
        rows: number of rows that were written.
    """

    problems: int = 0
    answers: int = 0
    right: int = 0
    wrong: int = 0
    left_out: int = 0
    all_right: int = 0
    none_right: int = 0
    some_right: int = 0
    gold: int = 0
    rows: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def describe(self) -> str:
        """The figures in words."""
        share = f" ({self.right / self.answers:.1%})" if self.answers else ""
        left_out = f", {self.left_out} cut off or empty and left out" if self.left_out else ""
        gold = f", {self.gold} of them with the task's own answer" if self.gold else ""
        return (
            f"{self.answers} answers to {self.problems} problems, {self.right} right{share}{left_out}; "
            f"{self.some_right} problems with right and wrong answers, {self.all_right} all right, "
            f"{self.none_right} none right{gold}"
        )

    def why_no_rows(self, choice: Choice, samples: int) -> str:
        """What to change where no row came of the answers, as the message of an error."""
        if self.left_out > self.answers / 2:
            return (
                f"No row came of {self.problems} problems: {self.left_out} of {self.answers} answers are empty or do "
                "not end within the task's length limit; train the model on the task first."
            )
        if choice.form == "pairs" and not self.none_right:
            return (
                f"No pair came of {self.problems} problems, since every answer to them is right; raise --temperature "
                f"({samples} samples were taken) or --limit, or choose a harder task."
            )
        gold = "" if choice.gold else ", or take the task's own answers as right ones with --gold"
        all_right = f", and {self.all_right} have no wrong one" if self.all_right else ""
        return (
            f"No {'pair' if choice.form == 'pairs' else 'row'} came of {self.problems} problems: {self.none_right} "
            f"have no right answer among {samples} samples{all_right}; raise --samples or --limit, train the model on "
            f"the task first{gold}."
        )


def choose_rows(
    task: Task, problem: Problem, answers: Sequence[Answer], choice: Choice, *, chat: bool
) -> tuple[list[dict[str, Any]], Tally]:
    """The rows that the answers to a problem make.

    An answer that was cut off is in no row: training would put an end to it, where the model has put none. Answers with
    the same text count once.

    Args:
        task: the task that has judged the answers.
        problem: the problem.
        answers: the answers to it.
        choice: which rows to make.
        chat: whether the prompt was put as a conversation. Then prompts and answers are lists of messages.

    Returns:
        The rows, as TRL has them, and the figures of the problem.
    """
    usable = [answer for answer in answers if answer.finished and answer.text.strip()]
    right = _distinct(answer.text for answer in usable if answer.right)
    wrong = _distinct(answer.text for answer in usable if not answer.right)
    rights = sum(answer.right for answer in usable)
    tally = Tally(
        problems=1,
        answers=len(answers),
        right=rights,
        wrong=len(usable) - rights,
        left_out=len(answers) - len(usable),
        all_right=bool(right and not wrong),
        none_right=not right,
        some_right=bool(right and wrong),
    )
    own = problem.row.completion
    if choice.gold and not right and (wrong or choice.form != "pairs") and task.score(own, problem):
        right, tally = [own], replace(tally, gold=1)
    if choice.form == "pairs":
        rng = random.Random(f"pairs-{choice.seed}-{task.name}-{problem.row.number}")
        pairs = choose_pairs(right, wrong, choice.pairs_per_problem, rng)
        made: list[dict[str, Any]] = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    else:
        made = [{"completion": text} for text in right]
        if choice.form == "labels":
            made = [row | {"label": True} for row in made] + [{"completion": text, "label": False} for text in wrong]
    rows = [_as_row(problem, row, chat) for row in made]
    return rows, replace(tally, rows=len(rows))


def training_settings(
    model: str, path: Path, choice: Choice, *, chat: bool, trained_as: Mapping[str, Any], base: str | None
) -> dict[str, Any]:
    """The settings by which training goes on from the model, and puts the rows as generation has put the prompts.

    Args:
        model: a run's folder, an adapter's folder, or any model.
        path: the file of the rows.
        choice: which rows it has.
        chat: whether prompts were put as conversations.
        trained_as: the run's recipe; empty if there is no run.
        base: the adapter's base model, where it is not the one that the adapter names.

    Returns:
        Values by the keys of a recipe, those of sections as ``section.key``. The chat template is the Jinja itself.
    """
    settings: dict[str, Any] = {}
    if is_adapter(model):
        settings["model"] = base or trained_as.get("model") or base_model_of(adapter_folder(model))
        settings["adapter"] = model
    else:
        whole = Path(model) / "model"
        settings["model"] = str(whole) if whole.is_dir() else model
    settings |= {"data.train": str(path), "chat": chat}
    if chat and trained_as.get("chat_template") is not None:
        settings["chat_template"] = trained_as["chat_template"]
    special_text = trained_as.get("data", {}).get("special_text", "keep")
    if special_text != "keep":
        settings["data.special_text"] = special_text
    if (objective := OBJECTIVES[choice.form]) is not None:
        settings["objective"] = objective
    return settings


def choose_pairs(right: Sequence[str], wrong: Sequence[str], most: int, rng: random.Random) -> list[tuple[str, str]]:
    """Choose pairs of a right and a wrong answer by chance, no pair twice, and each answer about as often as others.

    Args:
        right: right answers, each once.
        wrong: wrong answers, each once.
        most: the most pairs.
        rng: chooses.
    """
    right, wrong = rng.sample(right, len(right)), rng.sample(wrong, len(wrong))
    if not right or not wrong:
        return []
    # Counted side by side, both begin again together after the least common multiple, and then one is moved by one.
    period = math.lcm(len(right), len(wrong))
    return [
        (right[index % len(right)], wrong[(index + index // period) % len(wrong)])
        for index in range(min(most, len(right) * len(wrong)))
    ]


def _distinct(texts: Iterable[str]) -> list[str]:
    """The texts, each once up to the white space around it."""
    return list({text.strip(): text for text in texts}.values())


def _as_row(problem: Problem, made: dict[str, Any], chat: bool) -> dict[str, Any]:
    if not chat:
        return {"prompt": problem.row.prompt, **made}

    def said(value: Any) -> Any:
        return [{"role": "assistant", "content": value.strip()}] if isinstance(value, str) else value

    return {"prompt": list(problem.row.as_messages()[:-1]), **{key: said(value) for key, value in made.items()}}
