"""The folder that ``ollama create`` takes: a GGUF file, and a Modelfile that says how the model is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diablo.errors import UserError
from diablo.models.folders import adapter_folder, is_adapter, read_settings
from diablo.models.forms import ENCODER_DECODER, form_of
from diablo.publishing.go_template import PLAIN, turns_of

GGUF = "model.gguf"
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class Asking:
    """How Ollama asks a model.

    Attributes:
        template: a template of Go; None where the chat template cannot be translated, and Ollama has to choose.
        stops: texts that end an answer.
        sampling: Ollama's parameters of the sampling.
        system: the system's text; None where there is none.
    """

    template: str | None
    stops: tuple[str, ...]
    sampling: dict[str, float | int]
    system: str | None = None

    def modelfile(self) -> str:
        """The Modelfile."""
        lines = [f"FROM ./{GGUF}"]
        if self.template is None:
            lines.append("# The chat template cannot be translated into Ollama's language. Ollama chooses one itself.")
        else:
            lines.append(f'TEMPLATE """{self.template}"""')
        if self.system is not None:
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in self.stops]
        lines += [f"PARAMETER {name} {value:g}" for name, value in self.sampling.items()]
        return "\n".join(lines) + "\n"


def check_form(source: str) -> None:
    """Check that an adapter is not that of an encoder-decoder, before it is merged.

    Raises:
        UserError: it is.
    """
    task = read_settings(adapter_folder(source)).get("task_type") if is_adapter(source) else None
    if task == ENCODER_DECODER.task_type:
        raise UserError(_NO_ENCODER_DECODER.format(source))


_NO_ENCODER_DECODER = (
    "model: {!r} is an encoder-decoder, which Ollama does not run; merge it and serve it with transformers, or export "
    "gguf for llama.cpp, which runs T5."
)


def check_system(system: str | None, *, chat: bool | None) -> None:
    """Check a system's text, before anything is loaded.

    Raises:
        UserError: it has no place, or cannot be written into a Modelfile.
    """
    if system is None:
        return
    if chat is False:
        raise UserError("--system: found one for a model that is asked without a chat template; leave it out.")
    if '"""' in system or not system.strip():
        raise UserError(
            "--system: found a text that is empty, or has three quotes, which would end it in a Modelfile; change it."
        )


def how_to_ask(model: Path, *, chat: bool | None, system: str | None = None) -> Asking:
    """How Ollama should ask a model, so that it is asked as it was trained.

    Args:
        model: the folder of a plain transformers model.
        chat: whether it was trained through its chat template; None for yes where it has one.
        system: the system's text.

    Raises:
        UserError: there is no chat template where one is meant, it has no place for the system's text, or the model is
            an encoder-decoder.
    """
    # They import torch, for which nothing that is refused before is to wait.
    from diablo.models.loading import load_config, load_generation_config, load_tokenizer, stop_token_ids

    if form_of(config := load_config(str(model))) == ENCODER_DECODER:
        raise UserError(_NO_ENCODER_DECODER.format(str(model)))
    tokenizer = load_tokenizer(str(model))
    generation = load_generation_config(str(model))
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat and not tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {str(model)!r} has no chat template; give --no-chat.")
    check_system(system, chat=chat)
    template: str | None = PLAIN
    if chat:
        turns = turns_of(tokenizer)
        template = None if turns is None else turns.in_go()
        if turns is not None and turns.before_system is None and system is not None:
            raise UserError("--system: the model's chat template takes no system's text; leave it out.")
    ids = stop_token_ids(config, generation)
    stops = [tokenizer.convert_ids_to_tokens(index) for index in ids]
    named = tuple(stop for stop in stops if stop and '"' not in stop and stop.isprintable())
    return Asking(template, named, _sampling(generation), system)


def _sampling(generation: Any) -> dict[str, float | int]:
    """The sampling that the generation config asks for; the likeliest token where it does not sample."""
    if generation is None or not generation.do_sample:
        return {"temperature": 0}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: value for name in names if (value := getattr(generation, name, None)) is not None}
