"""The verb that asks a model with a head: labels of texts or of words, numbers, and scores of completions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diablo_cli.output import answer, out
from diablo_cli.shell import Base, app, check_model, quiet, read_texts

if TYPE_CHECKING:
    from diablo.data.rows import Row
    from diablo.models.heads import Head


@app.command()
def classify(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model with a head.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="The texts; standard input if none is given.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file in place of texts: a dataset as for training, or a .txt of lines.")
    ] = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read together.")] = 32,
) -> None:
    """Label texts or their words, give them numbers, or score completions, with a model that was trained to."""
    check_model(model)
    check_model(base, "--base")
    given = read_texts(texts, file)
    quiet()
    from diablo.models.loading import longest_text
    from diablo.models.ready import load_for_labels
    from diablo.records.results import recipe_of_run
    from diablo.scoring.labels import ask, say

    loaded, encoder, head = load_for_labels(model, base=base)
    rows = [_row(number, record, head) for number, record in enumerate(given, start=1)]
    data, training = (recipe_of_run(model).get(key, {}) for key in ("data", "training"))
    limit = training.get("max_length") if data.get("on_long") == "truncate" else None
    most = longest_text(encoder.tokenizer, loaded.config)
    answers = ask(loaded, encoder, rows, head, most=most, cut_at=limit, batch_size=batch_size)
    for row, each in zip(rows, answers, strict=True):
        if row.words:
            out.print(" ".join(f"{word['word']}/{word['label']}" for word in each["words"]), markup=False)
        else:
            out.print(f"{say(each)}  {_shown(row)}", markup=False)
    answer({"model": model, "kind": head.kind, "answers": answers})


def _row(number: int, record: Any, head: Head) -> Row:
    """What is asked about as a row without a label.

    Raises:
        UserError: it is none.
    """
    from diablo.data.faults import NoRowError
    from diablo.data.reading.labels import unlabelled
    from diablo.data.reading.preferences import to_score
    from diablo.errors import UserError

    try:
        if head.kind == "reward":
            return to_score(number, record)
        return unlabelled(number, record, words=head.kind == "token_classification")
    except NoRowError as error:
        raise UserError(str(error.at(number))) from None


def _shown(row: Row) -> str:
    text = row.messages[-1]["content"] if row.messages else row.completion or row.prompt
    line = " ".join(str(text).split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 3]}..."


_MOST_CHARACTERS = 80
