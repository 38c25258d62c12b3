"""Tasks and scores in words, for the terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from diablo.scoring.generation import Score
    from diablo.scoring.harness import HarnessFigure
    from diablo.tasks import Split, Task

# A year, and who wrote what in it: for the page about one task, not for the list of all.
_CITATION = re.compile(r" \([^()]*\b\d{4}\)")


def print_examples(out: Console, scores: dict[str, Score], count: int) -> None:
    """The first answers of an evaluation, or of the same problems before and after, side by side."""
    if not scores:
        return
    answers = [score.answers for score in scores.values()]
    for several in list(zip(*answers, strict=True))[:count]:
        out.print(several[0].problem.row.prompt, markup=False)
        for name, answer in zip(scores, several, strict=True):
            verdict = "right" if answer.right else "wrong"
            out.print(f"  {name:<7} {answer.text.strip()!r}  {verdict}", markup=False)
        out.print()


def harness_table(figures: list[HarnessFigure], title: str) -> Table:
    """The figures of lm-evaluation-harness."""
    table = Table("task", "shots", "problems", "metric", "value", "standard error", title=title)
    for figure in figures:
        counts = ("" if count is None else str(count) for count in (figure.shots, figure.problems))
        error = "" if figure.error is None else f"{figure.error:.4f}"
        table.add_row(figure.task, *counts, figure.metric, f"{figure.value:.4f}", error)
    return table


def tasks_table(tasks: Iterable[type[Task]]) -> Table:
    """What tasks are, and the sizes of their splits."""
    from diablo.tasks import SPLITS

    columns = (Column("task", no_wrap=True), *(Column(split, justify="right", no_wrap=True) for split in SPLITS))
    table = Table(*columns, "what it is")
    for task in tasks:
        sizes = dict.fromkeys(task.splits, "any") | {split: f"{size:,}" for split, size in _sizes(task)}
        summary = _CITATION.sub("", _paragraphs(task)[0])
        table.add_row(task.name, *(sizes.get(split, "") for split in SPLITS), escape(summary))
    return table


def print_task(out: Console, task: type[Task]) -> None:
    """All about a task: what it is, where its data comes from, and how its answers are read."""
    from diablo.tasks import PROTOCOLS

    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 1))

    def add(what: str, *lines: str) -> None:
        table.add_row(what, escape("\n".join(lines)))

    add("task", task.name)
    add("what it is", *_paragraphs(task))
    add("splits", ", ".join(f"{split} of {size:,} records" for split, size in _sizes(task)) or ", ".join(task.splits))
    source = task.source
    if source is None:
        add("data", "in the package")
    else:
        hub = [f"{source.hub} on the hub" + (f", configuration {source.config}" if source.config else "")]
        add("data", *hub * (source.hub is not None), f"published at {source.origin}")
        any_split = task.splits[0] if len(task.splits) == 1 else f"{{{','.join(task.splits)}}}"
        add("in a folder", "looked for in this order:", *source.paths(any_split))
    add("licence", task.licence or f"see {source.origin if source else 'the package'}")
    if "test" in task.splits:
        sampled = f", {task.samples} samples a problem at temperature {task.temperature}" if task.temperature else ""
        beams = f", {task.beams} beams under the paper's protocol" if task.beams > 1 else ""
        add("scored", f"{task.measure}; at most {task.max_new_tokens:,} new tokens{sampled}{beams}")
        for protocol, reading in zip(PROTOCOLS, task.readings, strict=True):
            add(protocol, reading)
    else:
        add("scored", "trained on only")
    is_local = source is not None and source.hub is None
    examples = []
    if "test" in task.splits:
        options = " --data-folder DATA" * is_local + " --allow-code-execution" * task.runs_code
        examples.append(f"diablo evaluate MODEL --task {task.name}{options}")
    if "train" in task.splits:
        examples.append(f"diablo train recipe.yaml task={task.name}" + " data.folder=DATA" * is_local)
    add("example", *examples)
    out.print(table)


def _sizes(task: type[Task]) -> list[tuple[Split, int]]:
    return list(zip(task.splits, task.sizes, strict=False))


def _paragraphs(task: type[Task]) -> list[str]:
    """A task's docstring as text to be wrapped."""
    text = inspect.cleandoc(task.__doc__ or "").replace("``", "'")
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]
