"""Verbs that give a result to others: the hub, llama.cpp and Ollama."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from diablo_cli.output import App, answer, out, progress
from diablo_cli.shell import Base, app, check_file, check_model, check_writes, quiet

if TYPE_CHECKING:
    from diablo.publishing.gguf import GgufReport

export = App(help="Write a model in another form: GGUF for llama.cpp, or a folder for Ollama.")
app.add_typer(export, name="export", no_args_is_help=True)


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's folder, or that of an adapter or of a merged model.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; it is made if there is none.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository; a public one that is there is an error.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch to upload to; it is made if there is none.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Upload the run's merged model in place of its adapter.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base model's id on the hub, if the adapter names a folder.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
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
        out.print(f"Left out, since they are no part of a model: {', '.join(map(escape, done.left_out))}.")
    if done.kept_card:
        out.print("The model card there has been edited and stays as it is; --overwrite-card replaces it.")
    answer({"folder": str(folder), **asdict(done)})


LlamaCpp = Annotated[
    Path | None,
    typer.Option("--llama-cpp", help="llama.cpp's folder; if not given, $LLAMA_CPP or the PATH says where it is."),
]
OutType = Annotated[str, typer.Option("--outtype", help="The weights' type: auto (16 bits), f32, f16, bf16 or q8_0.")]
Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run's folder, or that of an adapter or of a merged model.")
]


@export.command("gguf")
def export_gguf(
    source: Source,
    path: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, such as model.gguf.")],
    out_type: OutType = "auto",
    llama_cpp: LlamaCpp = None,
    base: Base = None,
) -> None:
    """Write a GGUF file for llama.cpp, by llama.cpp's own converter; an adapter is merged for it."""
    from diablo.publishing.gguf import check_out_type, check_plain, find_converter, plain_model, write_gguf

    check_writes(source, "export gguf")
    check_out_type(out_type)
    check_file(path, "OUT")
    check_model(base, "--base")
    converter = find_converter(llama_cpp)
    quiet()
    check_plain(source, base)
    with plain_model(source, path.parent, base=base, console=progress) as model:
        _print_gguf(write_gguf(model, path, converter, out_type=out_type, name=path.stem))


@export.command("ollama")
def export_ollama(
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the GGUF file and the Modelfile.")],
    out_type: OutType = "auto",
    llama_cpp: LlamaCpp = None,
    base: Base = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the chat template; if not given, as the run did, or if there is one."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system's text for every conversation.")] = None,
) -> None:
    """Write a folder that ollama create takes: a GGUF file, the template, and what ends an answer."""
    from diablo.models.folders import check_new_folder, new_folder
    from diablo.publishing.gguf import check_out_type, check_plain, find_converter, plain_model, write_gguf
    from diablo.publishing.ollama import GGUF, MODELFILE, check_form, check_system, how_to_ask
    from diablo.records.results import recipe_of_run

    check_writes(source, "export ollama")
    check_out_type(out_type)
    check_new_folder(folder, "model")
    check_model(base, "--base")
    check_form(source)
    chat = recipe_of_run(source).get("chat") if chat is None else chat
    check_system(system, chat=chat)
    converter = find_converter(llama_cpp)
    quiet()
    check_plain(source, base)
    name = folder.resolve().name.lower()
    with (
        new_folder(folder, "model") as target,
        plain_model(source, target.parent, base=base, console=progress) as model,
    ):
        asking = how_to_ask(model, chat=chat, system=system)
        (target / MODELFILE).write_text(asking.modelfile(), encoding="utf-8")
        report = write_gguf(model, target / GGUF, converter, out_type=out_type, name=name)
    _print_gguf(replace(report, path=folder / GGUF))
    if asking.template is None:
        out.print(
            "The chat template cannot be translated into Ollama's language. Ollama takes a similar one of its own, "
            f"or none: compare what ollama show --template {escape(name)} prints."
        )
    out.print(f"Try: ollama create {escape(name)} -f {escape(str(folder / MODELFILE))}", markup=False)


def _print_gguf(report: GgufReport) -> None:
    out.print(
        f"Wrote {escape(str(report.path))}: {report.tensors} tensors of {report.architecture}, "
        f"{report.parameters:,} parameters, {report.bytes / 1e6:,.1f} MB."
    )
    answer(asdict(report))
