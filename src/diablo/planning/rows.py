"""The rows of a recipe: read, mixed, split into what is trained on and what is held out, and made tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from diablo.data.documents import encode_document
from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.faults import Place, RowError, RowFault, explain_faults, name_places
from diablo.data.labelled import encode_compared, encode_labelled
from diablo.data.reading.sources import SourceRows, read_sources
from diablo.data.rows import Row, RowKind
from diablo.data.splits import cut_validation, distinct, take_turns
from diablo.errors import UserError
from diablo.models.heads import Head
from diablo.recipes.data import Data
from diablo.recipes.recipe import Recipe
from diablo.tasks import Problem, Split, Task, get_task, near_copies, without_tested


@dataclass(frozen=True)
class Rows:
    """Rows by what they are for.

    Attributes:
        train: rows to train on.
        held_out: rows that the held-out loss is of.
        faults: malformed rows, which were left out.
        tested: how many training rows were left out because they are tested on.
        near_copies: how many problems that are tested on have the words of a training row, and how many there are.
        validation: how many rows were kept out of training for validation.
        validation_problems: the problems that these rows are of, by task; nothing where they are not of tasks.
        problems: all problems of the tasks that are trained on, by task.
        sources: what the training rows were read from; nothing where they are a task's.
        held_out_sources: the same of the held-out rows; nothing where they are cut out of the training rows.
    """

    train: list[Row]
    held_out: list[Row]
    faults: list[RowFault] = field(default_factory=list)
    tested: int = 0
    near_copies: tuple[int, int] = (0, 0)
    validation: int = 0
    validation_problems: dict[str, list[Problem]] = field(default_factory=dict)
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    sources: list[SourceRows] = field(default_factory=list)
    held_out_sources: list[SourceRows] = field(default_factory=list)


def choose_rows(recipe: Recipe, scored: Sequence[Task]) -> Rows:
    """Read the rows of a recipe, and choose what they are for.

    Args:
        recipe: the recipe.
        scored: the tasks that are scored, whose problems are not trained on.

    Raises:
        UserError: a source cannot be read, or nothing is left to train on.
    """
    data = recipe.data
    trained = [get_task(name, folder=data.folder) for name in recipe.task]
    # A task that is trained on is mostly scored too, and its test split is read once.
    tasks = {task.name: task for task in (*scored, *trained)}
    tests = {name: task.problems("test") for name, task in tasks.items() if "test" in task.splits}
    problems = {task.name: task.problems("train") for task in trained}
    rows = (
        _rows_of_tasks(problems, tests, recipe.evaluation.limit)
        if trained
        else _rows_of_sources(data, recipe.objective.rows)
    )
    tested = [problem for problems in tests.values() for problem in problems]
    train, left_out = without_tested(rows.train, tested)
    if not train:
        raise UserError(f"All {left_out} training rows are tested on as well; nothing is left to train on.")
    train, cut, validation = _cut(train, data)
    held_out = rows.held_out if cut is None else cut
    return replace(
        rows,
        train=train,
        held_out=validation if data.held_out == "validation" else held_out,
        tested=left_out,
        near_copies=(near_copies(train, tested), len(tested)),
        validation=len(validation),
        validation_problems=_problems_of(validation, problems),
        problems={name: [*of_task, *tests.get(name, [])] for name, of_task in problems.items()},
    )


def training_problems(tasks: Sequence[Task], recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Problem]]:
    """The training problems of tasks, without those that a model is scored or chosen by.

    A problem is left out where its prompt stands, word for word, among the problems that are tested on, or among those
    that a run has kept for validation.

    Args:
        tasks: the tasks.
        recipes: the recipes of the runs that have made the model, as their records have them.

    Returns:
        The problems by the tasks' names, in the order of training.

    Raises:
        UserError: the data of a task cannot be read, or no problem of a task is left.
    """
    known = {task.name: task for task in tasks}

    @cache
    def problems_of(name: str, split: Split) -> list[Problem]:
        return known[name].problems(split) if split in known[name].splits else []

    apart = [problem for task in tasks for problem in problems_of(task.name, "test")]
    for recipe in recipes:
        data, own, evaluation = Data.model_validate(recipe["data"]), recipe["task"], recipe["evaluation"]
        tests = {}
        for name in dict.fromkeys([*own, *(evaluation["tasks"] or [])]):
            if name not in known:
                known[name] = get_task(name, folder=data.folder, protocol=evaluation["protocol"])
            tests[name] = problems_of(name, "test")
        tested = [problem for of_task in tests.values() for problem in of_task]
        apart += tested
        if own and data.validation_rows:
            problems = {name: problems_of(name, "train") for name in own}
            train, _ = without_tested(_rows_of_tasks(problems, tests, None).train, tested)
            validation = _problems_of(_cut(train, data)[2], problems)
            apart += [problem for of_task in validation.values() for problem in of_task]
    asked = {task.name: problems_of(task.name, "train") for task in tasks}
    rows, _ = without_tested([problem.row for of_task in asked.values() for problem in of_task], apart)
    left = _problems_of(rows, asked)
    if missing := [name for name in asked if name not in left]:
        raise UserError(
            f"--task: every training problem of {missing[0]} is tested or validated on; choose another task."
        )
    return left


def _cut(train: Sequence[Row], data: Data) -> tuple[list[Row], list[Row] | None, list[Row]]:
    """Cut the rows that are kept out of training from the rows that could be trained on.

    Returns:
        The rows to train on; those to hold out, None where they are not cut out; and those to validate on.
    """
    held_out, validation = None, list[Row]()
    cut = data.held_out_rows(len(distinct(train[: data.limit])))
    apart = data.validation_rows or 0
    if data.limit is not None:
        train = train[: data.limit + cut + apart]
    if cut:
        train, held_out = cut_validation(train, cut, data.validation_seed, key="data.eval")
    if apart:
        train, validation = cut_validation(train, apart, data.validation_seed, key="data.validation_rows")
    return list(train[: data.limit]), held_out, validation


def _rows_of_tasks(
    problems: Mapping[str, list[Problem]], tests: Mapping[str, list[Problem]], limit: int | None
) -> Rows:
    train = take_turns([[problem.row for problem in of_task] for of_task in problems.values()])
    held_out = [problem.row for name in problems for problem in tests.get(name, [])[:limit]]
    return Rows(train, held_out)


def _problems_of(rows: Sequence[Row], problems: Mapping[str, list[Problem]]) -> dict[str, list[Problem]]:
    """The problems whose rows these are, by task; tasks without any are left out."""
    chosen = {id(row) for row in rows}
    found = {name: [each for each in of_task if id(each.row) in chosen] for name, of_task in problems.items()}
    return {name: of_task for name, of_task in found.items() if of_task}


def _rows_of_sources(data: Data, kind: RowKind) -> Rows:
    asked = [source.resolved(data.columns) for source in (*(data.train or ()), *data.eval_sources)]
    found = read_sources(asked, kind=kind, on_malformed=data.on_malformed)
    count = len(data.train or ())
    sources, held_out = found[:count], found[count:]
    return Rows(
        take_turns([each.rows for each in sources], [each.source.weight for each in sources]),
        [row for each in held_out for row in each.rows],
        [fault for each in found for fault in each.faults],
        sources=sources,
        held_out_sources=held_out,
    )


def measured_rows(recipe: Recipe, rows: Rows) -> list[Row]:
    """The held-out rows that are measured: their loss, or the rewards of their prompts' completions.

    To complete all prompts of a task's test split takes as long as to score the task, which is done before and after
    training anyway. So it is done for those who ask for it.
    """
    asked_for = recipe.training.eval_steps or recipe.data.eval or recipe.data.held_out == "validation"
    return rows.held_out if asked_for or recipe.objective.rows != "prompts" else []


def encode_rows(
    recipe: Recipe,
    encoder: RowEncoder,
    rows: list[Row],
    what: str,
    left_out: list[RowFault],
    head: Head | None = None,
    most: int | None = None,
    prompts: tuple[str, str] = ("", ""),
) -> tuple[list[EncodedRow], list[Place]]:
    """The rows as tokens; a document in as many pieces as it takes.

    Args:
        recipe: the recipe.
        encoder: rows to tokens.
        rows: the rows.
        what: what they are, for messages.
        left_out: those that cannot be encoded and are left out are added to this.
        head: the head that labels them, where they are labelled.
        most: the most tokens that the model can read, and the decoder of an encoder-decoder can write; None where it is
            not known.
        prompts: what is put before a text that is compared, and before each of those that it is compared with.

    Returns:
        The rows as tokens, and where those stand that are too long and are left out.

    Raises:
        UserError: some rows cannot be encoded or are too long, and the recipe leaves none out, or none are left.
    """
    of_part = most if encoder.encoder_decoder else None
    whole = min(recipe.training.max_length, (most if of_part is None else None) or recipe.training.max_length)
    limit = whole - recipe.max_new_tokens
    cut_at = limit if recipe.data.on_long == "truncate" else None
    encode = encoder.encode_all if recipe.objective.rows != "prompts" else lambda row: [encoder.encode_prompt(row)]
    encoded: list[EncodedRow] = []
    faults: list[RowFault] = []
    for row in rows:
        if row.text and encoder.encoder_decoder:
            raise UserError(
                f"data: found a document ({name_places([Place(row.number, row.source)])}) among the {what} rows, and "
                f"{recipe.model!r} is an encoder-decoder, which reads a prompt and writes a completion; give rows with "
                "these two, or a causal language model."
            )
        if row.text:
            encoded += encode_document(row, encoder.texts, limit)
            continue
        if row.others:
            encoded.append(encode_compared(row, encoder.texts, cut_at, prompts))
            continue
        if head is not None and row.label is not None:
            encoded.append(encode_labelled(row, encoder.texts, head.labels, cut_at, several=head.several))
            continue
        try:
            encoded += [replace(own, source=row.source) for own in encode(row)]
        except RowError as error:
            faults.append(replace(error.fault, source=row.source))
    if faults and (recipe.data.on_malformed == "error" or not encoded):
        raise UserError(
            f"{len(faults)} of {len(rows)} {what} rows cannot be used. {explain_faults(faults)} "
            "Mend them, or set data.on_malformed=skip to leave some out."
        )
    left_out += faults

    def fits(row: EncodedRow) -> bool:
        return row.length <= limit and (of_part is None or max(row.parts) <= of_part)

    kept = [row for row in encoded if fits(row)]
    # A conversation may have become several.
    too_long = list(dict.fromkeys(Place(row.number, row.source) for row in encoded if not fits(row)))
    if too_long and (recipe.data.on_long == "error" or not kept):
        longest = max(row.length for row in encoded)
        room = f", of which objective.max_new_tokens leaves {limit} to prompts" if recipe.max_new_tokens else ""
        cut = ", or truncate to cut them" if head is not None and encoded[0].rejected is None else ""
        is_models = whole < recipe.training.max_length or (of_part is not None and of_part < recipe.training.max_length)
        reads, mend = (room, "Raise it, or set")
        if is_models:
            reads, mend = f", and the model reads {of_part or limit} tokens", "Set"
        raise UserError(
            f"training.max_length: found {recipe.training.max_length}{reads}; {len(too_long)} of {len(rows)} rows are "
            f"longer (up to {longest} tokens; the first is {name_places(too_long[:1])}). {mend} data.on_long=drop"
            f" to leave some out{cut}."
        )
    return kept, too_long
