"""The verb that serves a model and its adapters over HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from diablo_cli.output import out
from diablo_cli.shell import app, check_model, check_writes, quiet

_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_MIXED = ("auto", "never", "always")


@app.command(no_record="a server has no one record; its log on standard error is lines of JSON")
def serve(
    model: Annotated[str, typer.Argument(help="The base model; or a run or an adapter, served with its base model.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=FOLDER", help="An adapter or a run; may be given several times."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapters, by the names of their folders; it is watched.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", envvar="DIABLO_API_KEY", help="A bearer token for clients; may be given several times."
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests of a client in a minute: of a key, or of an address.")
    ] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens of a client in a minute.")] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the base model.")] = None,
    precision: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(_PRECISIONS)}.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 16,
    turn: Annotated[int, typer.Option(min=1, help="Forwards of an adapter's turn while others wait.")] = 32,
    mixed: Annotated[str, typer.Option(help=f"Rows of several adapters in one batch: {', '.join(_MIXED)}.")] = "auto",
    cache_tokens: Annotated[int, typer.Option(min=2, help="Tokens whose keys and values are kept at once.")] = 65536,
    queue: Annotated[int, typer.Option(min=1, help="Rows that may wait; further requests get status 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt, in tokens.")] = None,
    max_body: Annotated[float, typer.Option(min=0.001, help="Largest body of a request, in MiB.")] = 4.0,
    adapter_memory: Annotated[float, typer.Option(min=0, help="Host memory for adapters, in GiB.")] = 4.0,
    hot_adapters: Annotated[int, typer.Option(min=1, help="Adapters that stay on the GPU.")] = 8,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for accepted requests after SIGTERM.")] = 30.0,
) -> None:
    """Serve a model and its adapters by OpenAI's API, with a page to compare two of them."""
    from diablo.errors import UserError
    from diablo.models.folders import adapter_folder, base_model_of, is_adapter

    check_writes(model, "serve")
    check_model(model)
    if missing := [package for package in ("starlette", "uvicorn") if find_spec(package) is None]:
        raise UserError(f"serve: it needs {' and '.join(missing)}; install it with: pip install 'diablo-peft[serve]'.")
    if precision not in _PRECISIONS:
        raise UserError(f"--precision: found {precision!r}; allowed: {', '.join(_PRECISIONS)}.")
    if mixed not in _MIXED:
        raise UserError(f"--mixed: found {mixed!r}; allowed: {', '.join(_MIXED)}.")
    keys = tuple(api_key or ())
    # An environment that has blanks alone gives no key, and must not open the server to everybody.
    if "" in keys or (not keys and os.environ.get("DIABLO_API_KEY")):
        raise UserError("--api-key: found an empty one, which anybody has; give another, or leave it out.")
    if len(set(keys)) < len(keys):
        raise UserError("--api-key: found one twice; give each client a key of its own, or this one once.")
    if tokens_per_minute is not None and tokens_per_minute <= max_tokens:
        raise UserError(
            f"--tokens-per-minute: found {tokens_per_minute}, where one answer may have {max_tokens} tokens; allowed: "
            "more than that; give more, or lower --max-tokens."
        )
    base, given = model, _named(adapter or ())
    if is_adapter(model):
        folder = adapter_folder(model)
        base = base_model_of(folder)
        _add(given, Path(model).resolve().name, folder, "MODEL")
        check_model(base)
    called = name or (Path(base).resolve().name if Path(base).is_dir() else base)
    if called in given:
        raise UserError(f"--adapter: {called!r} is what the base model is called; give another name, or --name.")
    if adapters is not None and not adapters.is_dir():
        raise UserError(f"--adapters: there is no folder {str(adapters)!r}; give one, which may be empty.")
    from diablo.web.address import is_loopback, taken_address, url_of

    taken = taken_address(host, port)
    quiet()
    from diablo.serving.scheduling import Limits
    from diablo.web.app import Access
    from diablo.web.serve import Settings, serve

    settings = Settings(
        model=base,
        name=called,
        adapters=given,
        folder=adapters,
        precision=None if precision == "auto" else precision,
        limits=Limits(rows=batch_size, steps=turn, tokens=cache_tokens, mixed=mixed),
        queue=queue,
        written=max_tokens,
        prompt=max_prompt_tokens,
        memory=int(adapter_memory * 2**30),
        hot=hot_adapters,
        access=Access(keys, is_loopback(host), int(max_body * 2**20), requests_per_minute, tokens_per_minute),
        grace=grace,
    )

    def ready(count: int) -> None:
        url = url_of(taken)
        out.print(f"Serving {escape(called)} and {count} adapters at {url}: the API at {url}/v1, a page at {url}/.")

    serve(settings, taken, ready)


def _named(given: Sequence[str]) -> dict[str, Path]:
    """The folders of adapters by name.

    Raises:
        UserError: one is not NAME=FOLDER, is no adapter of DiaBlo, or has the name of another.
    """
    from diablo.errors import UserError
    from diablo.models.folders import adapter_folder

    named: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--adapter: found {each!r}; give NAME=FOLDER, such as support=runs/support.")
        _add(named, name, adapter_folder(folder), "--adapter")
    return named


def _add(named: dict[str, Path], name: str, folder: Path, option: str) -> None:
    from diablo.errors import UserError
    from diablo.models.folders import read_settings

    check_writes(str(folder), "serve")
    method: Any = read_settings(folder).get("peft_type")
    if method != "DIABLO":
        raise UserError(
            f"{option}: {str(folder)!r} is an adapter of {method}, and diablo serve takes DiaBlo's alone; merge it "
            "with diablo merge, and serve the merged model."
        )
    if name in named:
        raise UserError(f"{option}: {name!r} is given twice; give each adapter a name of its own.")
    named[name] = folder
