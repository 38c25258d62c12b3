"""From a model's name and adapters' folders to a server that answers."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diablo.errors import UserError
from diablo.models.forms import CAUSAL, form_of
from diablo.models.ready import load_for_generation
from diablo.serving.adapters import Adapters
from diablo.serving.batch import check_decoding
from diablo.serving.engine import Engine
from diablo.serving.prompts import PromptsByAdapter
from diablo.serving.scheduling import Limits
from diablo.serving.weights import Weights
from diablo.web.app import Access, Server
from diablo.web.asking import Asking, Bounds
from diablo.web.log import log_to_standard_error, note
from diablo.web.running import run


@dataclass(frozen=True)
class Settings:
    """What a server serves, and within which limits.

    Attributes:
        model: the base model: a folder, an id on the hub, or a builtin one.
        name: what requests call it.
        adapters: folders of adapters by the names that requests have for them.
        folder: a folder whose sub-folders are adapters, which is watched; None for none.
        precision: of the weights, as recipes name it.
        limits: of turns and of memory for keys and values.
        queue: the most rows that wait.
        written: the most tokens of an answer.
        prompt: the most tokens of a prompt; None where the model's context alone limits it.
        memory: bytes of host memory for adapters.
        hot: adapters that stay on a GPU.
        access: who may ask.
        grace: seconds that are left to accepted requests when the server is told to end.
    """

    model: str
    name: str
    adapters: Mapping[str, Path]
    folder: Path | None = None
    precision: str | None = None
    limits: Limits = field(default_factory=Limits)
    queue: int = 256
    written: int = 1024
    prompt: int | None = None
    memory: int = 4 << 30
    hot: int = 8
    access: Access = field(default_factory=Access)
    grace: float = 30.0


def serve(settings: Settings, taken: socket.socket, ready: Callable[[int], None]) -> None:
    """Load a model, check the adapters that were named, and answer until the process is told to end.

    Args:
        settings: what is served.
        taken: the socket to listen at.
        ready: called with the number of adapters when requests are taken.

    Raises:
        UserError: the model cannot be served, or an adapter that was named cannot be used.
    """
    model, encoder = load_for_generation(settings.model, chat=False, precision=settings.precision)
    if form_of(model.config) is not CAUSAL:
        raise UserError(
            f"model: {settings.model!r} reads more than the text before what it writes, and diablo serve takes causal "
            "language models alone; ask it with diablo generate."
        )
    model.eval().requires_grad_(False)
    check_decoding(model, settings.model)
    weights = Weights(model, settings.name)
    adapters = Adapters(weights, settings.memory, settings.hot, settings.folder)
    for name, folder in settings.adapters.items():
        adapters.add(name, folder)
    # The second look takes what was there in the first.
    adapters.look()
    adapters.look()
    tokenizer = encoder.tokenizer
    # Two threads use one, and a tokenizer is not made for that.
    engine = Engine(weights, adapters, copy.deepcopy(tokenizer), settings.limits, settings.queue)
    bounds = Bounds(
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        settings.prompt,
        settings.written,
        settings.limits.tokens,
        len(tokenizer),
    )
    prompts = PromptsByAdapter(tokenizer, sorted(encoder.stop_token_ids))
    asking = Asking(settings.name, adapters, prompts, bounds)
    server = Server(engine, asking, copy.deepcopy(tokenizer), settings.access)
    log_to_standard_error()
    engine.start()

    def told() -> None:
        count = len(adapters.known())
        note("ready", model=settings.name, adapters=count, device=str(model.device), dtype=str(model.dtype))
        ready(count)

    run(engine, server, taken, grace=settings.grace, ready=told)
