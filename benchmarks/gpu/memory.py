"""The peak of a training step with each choice of gradient checkpointing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.measuring import timed
from benchmarks.gpu.models import EAGER, Training, load_language
from benchmarks.gpu.recorder import NotThereError, Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.methods import FROZEN, IN_PLACE

CHOICES = ("none", "selective", "full")
METHODS = (FROZEN, IN_PLACE, "LoRA")


def options_of(choice: Any) -> dict[str, Any] | None:
    """Arguments of transformers' gradient checkpointing; None where the choice is ``none``.

    Raises:
        NotThereError: this version of diablo has no selective checkpointing.
    """
    try:
        from diablo.models.checkpointing import checkpointing_options
    except ImportError as error:
        if choice == "selective":
            raise NotThereError(f"not there: {error}") from None
        return None if choice == "none" else {"use_reentrant": False}
    return checkpointing_options(choice)


def measure(recorder: Recorder, sizes: Sizes, device: torch.device) -> None:
    """Measure a row for every choice and method, on the first model."""
    language = sizes.languages[0]
    base, _ = load_language(language, device)

    def one(method: str, choice: str) -> dict[str, Any]:
        options = options_of(choice)

        def enable(adapted: Any) -> None:
            if options is not None:
                adapted.gradient_checkpointing_enable(options)

        training = Training(base, method, EAGER, language, device, enable)
        figures = timed(training.step, None, sizes, device)
        del figures["ratio_to_frozen"]
        return {"peak_bytes": training.peak, **figures}

    for choice in CHOICES:
        for method in METHODS:
            recorder.row(partial(one, method, choice), model=language.name, checkpointing=choice, method=method)
