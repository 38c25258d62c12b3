"""The verb that asks a model for vectors of texts, or for how near they are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from diablo_cli.output import answer, out
from diablo_cli.shell import Base, app, check_model, quiet, read_texts


@app.command()
def embed(
    model: Annotated[
        str, typer.Argument(help="A run's folder, an adapter's folder, or any model of texts, such as one of the hub.")
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="The texts; standard input if none is given.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file in place of texts: a .txt of lines, or a dataset with a column text.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A new .jsonl file for the vectors, in place of standard output.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The name of the model's prompt that is put before each text, such as query.")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Print the cosine of the first text with each of the others.")
    ] = False,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read together.")] = 32,
) -> None:
    """Write the vectors of texts, a JSON object a line, or how near texts are, by a model of objective embedding."""
    from diablo.errors import UserError

    check_model(model)
    check_model(base, "--base")
    if find_spec("sentence_transformers") is None:
        raise UserError(
            "embed: it needs sentence-transformers; install it with: pip install 'diablo-peft[embeddings]'."
        )
    if to is not None and (similarity or to.exists() or not to.parent.is_dir()):
        why = (
            "--similarity writes no vectors"
            if similarity
            else "it is there already"
            if to.exists()
            else f"there is no folder {str(to.parent)!r}"
        )
        raise UserError(f"--out: found {str(to)!r}, and {why}; give another name, or leave it out.")
    given = [_text(number, each) for number, each in enumerate(read_texts(texts, file), start=1)]
    if similarity and len(given) < 2:
        raise UserError(f"--similarity: found {len(given)} text, which is compared with others; give two or more.")
    quiet()
    from diablo.data.labelled import encode_labelled
    from diablo.data.rows import Row
    from diablo.models.ready import load_for_vectors
    from diablo.scoring.vectors import cosines, vectors_of

    loaded, encoder, vectors = load_for_vectors(model, base=base)
    if prompt is not None and prompt not in vectors.prompts:
        known = ", ".join(vectors.prompts) or "none"
        raise UserError(f"--prompt: found {prompt!r}; the model has {known}.")
    before = vectors.prompt(prompt)
    rows = [
        encode_labelled(Row(number, before + text), encoder.texts, (), vectors.most)
        for number, text in enumerate(given, start=1)
    ]
    made = vectors_of(loaded, vectors, rows, encoder.tokenizer.pad_token_id, batch_size=batch_size)
    cut = sum(row.is_cut for row in rows)
    record: dict[str, Any] = {"model": model, "size": vectors.size, "texts_cut": cut, "out": to}
    if similarity:
        near = cosines(made[:1], made[1:])
        for text, value in zip(given[1:], near, strict=True):
            out.print(f"{value:.4f}  {' '.join(text.split())}", markup=False)
        answer({**record, "similarities": near})
        return
    lines = [{"text": text, "embedding": values} for text, values in zip(given, made.tolist(), strict=True)]
    if to is None:
        for line in lines:
            out.print(json.dumps(line, ensure_ascii=False), markup=False)
        answer({**record, "vectors": lines})
        return
    with _opened(to) as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    told = f", {cut} of them cut to {vectors.most} tokens" if cut else ""
    out.print(f"Wrote {to}: the vectors of {len(lines)} texts, of {vectors.size} numbers each{told}.", markup=False)
    answer({**record, "vectors": len(lines)})


def _text(number: int, given: Any) -> str:
    """A text, or that of an object of a dataset.

    Raises:
        UserError: it is none.
    """
    from diablo.errors import UserError, shortened

    text = given.get("text") if isinstance(given, dict) else given
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"TEXT: number {number} is {shortened(given)}; give a text, or an object with text.")
    return text


@contextlib.contextmanager
def _opened(path: Path) -> Generator[TextIO]:
    """A new file, which is there whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from diablo.errors import UserError, first_line

    half = path.with_name(f".{path.name}.half")
    try:
        with half.open("w", encoding="utf-8") as stream:
            yield stream
        half.rename(path)
    except OSError as error:
        raise UserError(f"--out: {str(path)!r} cannot be written: {first_line(error)}.") from None
    finally:
        half.unlink(missing_ok=True)
