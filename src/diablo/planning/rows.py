"""The rows of a recipe: read, mixed, split into what is trained on and what is held out, and made tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from diablo.data.documents import encode_document
from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.faults import Place, RowError, RowFault, explain_faults, name_places
from diablo.data.labelled import encode_labelled
from diablo.data.reading.sources import SourceRows, read_sources
from diablo.data.rows import Row, RowKind
from diablo.data.splits import cut_validation, distinct, take_turns
from diablo.errors import UserError
from diablo.models.heads import Head
from diablo.recipes.data import Data
from diablo.recipes.recipe import Recipe
from diablo.tasks import Problem, Task, get_task, without_tested


@dataclass(frozen=True)
class Rows:
    """Rows by what they are for.

    Attributes:
        train: rows to train on.
        held_out: rows that the held-out loss is of.
        faults: malformed rows, which were left out.
        tested: how many training rows were left out because they are tested on.
        validation: how many rows were kept out of training for validation.
        validation_problems: the problems that these rows are of, by task; nothing where they are not of tasks.
        sources: what the training rows were read from; nothing where they are a task's.
        held_out_sources: the same of the held-out rows; nothing where they are cut out of the training rows.
    """

    train: list[Row]
    held_out: list[Row]
    faults: list[RowFault] = field(default_factory=list)
    tested: int = 0
    validation: int = 0
    validation_problems: dict[str, list[Problem]] = field(default_factory=dict)
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
    held_out, validation = rows.held_out, list[Row]()
    cut = data.held_out_rows(len(distinct(train[: data.limit])))
    apart = data.validation_rows or 0
    if data.limit is not None:
        train = train[: data.limit + cut + apart]
    if cut:
        train, held_out = cut_validation(train, cut, data.validation_seed, key="data.eval")
    if apart:
        train, validation = cut_validation(train, apart, data.validation_seed, key="data.validation_rows")
    return replace(
        rows,
        train=train[: data.limit],
        held_out=validation if data.held_out == "validation" else held_out,
        tested=left_out,
        validation=len(validation),
        validation_problems=_problems_of(validation, problems),
    )


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


def encode_rows(
    recipe: Recipe,
    encoder: RowEncoder,
    rows: list[Row],
    what: str,
    left_out: list[RowFault],
    head: Head | None = None,
    most: int | None = None,
) -> tuple[list[EncodedRow], list[Place]]:
    """The rows as tokens; a document in as many pieces as it takes.

    Args:
        recipe: the recipe.
        encoder: rows to tokens.
        rows: the rows.
        what: what they are, for messages.
        left_out: those that cannot be encoded and are left out are added to this.
        head: the head that labels them, where they are labelled.
        most: the most tokens that the model can read; None where it is not known.

    Returns:
        The rows as tokens, and where those stand that are too long and are left out.

    Raises:
        UserError: some rows cannot be encoded or are too long, and the recipe leaves none out, or none are left.
    """
    limit = min(recipe.training.max_length, most or recipe.training.max_length)
    cut_at = limit if recipe.data.on_long == "truncate" else None
    encoded: list[EncodedRow] = []
    faults: list[RowFault] = []
    for row in rows:
        if row.text:
            encoded += encode_document(row, encoder.texts, limit)
            continue
        if head is not None and row.label is not None:
            encoded.append(encode_labelled(row, encoder.texts, head.labels, cut_at, several=head.several))
            continue
        try:
            encoded += [replace(own, source=row.source) for own in encoder.encode_all(row)]
        except RowError as error:
            faults.append(replace(error.fault, source=row.source))
    if faults and (recipe.data.on_malformed == "error" or not encoded):
        raise UserError(
            f"{len(faults)} of {len(rows)} {what} rows cannot be used. {explain_faults(faults)} "
            "Mend them, or set data.on_malformed=skip to leave some out."
        )
    left_out += faults
    kept = [row for row in encoded if row.length <= limit]
    # A conversation may have become several.
    too_long = list(dict.fromkeys(Place(row.number, row.source) for row in encoded if row.length > limit))
    if too_long and (recipe.data.on_long == "error" or not kept):
        longest = max(row.length for row in encoded)
        cut = ", or truncate to cut them" if head is not None and encoded[0].rejected is None else ""
        is_models = limit < recipe.training.max_length
        reads, mend = (f", and the model reads {limit} tokens", "Set") if is_models else ("", "Raise it, or set")
        raise UserError(
            f"training.max_length: found {recipe.training.max_length}{reads}; {len(too_long)} of {len(rows)} rows are "
            f"longer (up to {longest} tokens; the first is {name_places(too_long[:1])}). {mend} data.on_long=drop"
            f" to leave some out{cut}."
        )
    return kept, too_long
