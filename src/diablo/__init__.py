"""DiaBlo: fine-tuning of the diagonal blocks of weight matrices, as a method of huggingface/peft.

Importing this package registers the method with PEFT. A process that loads a DiaBlo adapter must import it first::

    import diablo
    from peft import get_peft_model

    model = get_peft_model(model, diablo.DiabloConfig(num_blocks=64))

The method: DiaBlo, "Diagonal Blocks Are Sufficient For Finetuning", ICLR 2026, arXiv 2506.03230.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diablo._version import __version__
from diablo.importing import when_imported

if TYPE_CHECKING:
    from diablo.layout import BlockLayout
    from diablo.ops import block_diagonal_linear, block_diagonal_linear_reference
    from diablo.tuner import (
        DiabloConfig,
        DiabloConv,
        DiabloEmbedding,
        DiabloLayer,
        DiabloLinear,
        DiabloModel,
        DiabloParameters,
        DiabloQuantizedLinear,
        LoraConversion,
        LowLearningRateWarning,
        convert_to_lora,
        hotswap_adapter,
        preview_targets,
        suggested_learning_rate,
    )

__all__ = [
    "BlockLayout",
    "DiabloConfig",
    "DiabloConv",
    "DiabloEmbedding",
    "DiabloLayer",
    "DiabloLinear",
    "DiabloModel",
    "DiabloParameters",
    "DiabloQuantizedLinear",
    "LoraConversion",
    "LowLearningRateWarning",
    "__version__",
    "block_diagonal_linear",
    "block_diagonal_linear_reference",
    "convert_to_lora",
    "hotswap_adapter",
    "preview_targets",
    "suggested_learning_rate",
]

# PEFT and torch take seconds to import. What is in these rooms is imported when it is first asked for.
_ROOMS = ("errors", "layout", "ops", "tuner")
_OUTSIDE_THE_TUNER = {
    "BlockLayout": "diablo.layout",
    "block_diagonal_linear": "diablo.ops",
    "block_diagonal_linear_reference": "diablo.ops",
}

# A type checker takes the names from the imports above, and would accept any name beside this function.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"diablo.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _OUTSIDE_THE_TUNER:
            return getattr(import_module(_OUTSIDE_THE_TUNER[name]), name)
        # PEFT first, which imports the tuner: so threads that want the one or the other take both in one order.
        import_module("peft")
        return getattr(import_module("diablo.tuner"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *__all__})


def _register() -> None:
    # The tuner registers itself at its end. It may be the tuner that imports PEFT, here or in another thread: then this
    # statement accepts it unfinished, where import_module can raise, and a name could not be taken from it.
    import diablo.tuner  # noqa: F401


when_imported("peft", _register)
