"""Verbs that give a result to others: the hub, llama.cpp and Ollama."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from diablo_cli.shell import app, out, quiet


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's folder, or that of an adapter or of a merged model.")
    ],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; it is made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Only where the repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made where it is missing.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The run's merged model, and not its adapter.")] = False,
    base: Annotated[
        str | None, typer.Option(help="The base model's id on the hub, where the adapter names a folder.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a model card that somebody has edited on the hub.")
    ] = False,
) -> None:
    """Upload an adapter or a model to the hub, with its model card."""
    from diablo.models.names import check_repository
    from diablo.publishing.hub import Repository, folder_to_upload, upload

    check_repository(repo, "REPO")
    folder, kind = folder_to_upload(source, merged=merged)
    quiet()
    done = upload(
        folder,
        kind,
        Repository(repo, private, revision),
        base=base,
        message=message,
        overwrite_card=overwrite_card,
    )
    out.print(f"Uploaded {', '.join(map(escape, done.files))} of {escape(str(folder))} to {escape(done.url)}.")
    if done.left_out:
        out.print(f"Left out, since no part of a model: {', '.join(map(escape, done.left_out))}.")
    if done.kept_card:
        out.print("The model card there has been edited and stays as it is; --overwrite-card replaces it.")
