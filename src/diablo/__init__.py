"""DiaBlo: fine-tuning of the diagonal blocks of weight matrices, as a method of huggingface/peft.

Importing this package registers the method with PEFT. A process that loads a DiaBlo adapter must import it first::

    import diablo
    from peft import get_peft_model

    model = get_peft_model(model, diablo.DiabloConfig(num_blocks=64))

The method: DiaBlo, "Diagonal Blocks Are Sufficient For Finetuning", ICLR 2026, arXiv 2506.03230.
"""

from diablo._version import __version__
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
    convert_to_lora,
    hotswap_adapter,
    preview_targets,
    register,
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
    "__version__",
    "block_diagonal_linear",
    "block_diagonal_linear_reference",
    "convert_to_lora",
    "hotswap_adapter",
    "preview_targets",
]

register()
