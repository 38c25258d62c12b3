"""What is measured, and how large: on a GPU, and tiny, for a rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PARTS = ("layers", "kernels", "steps", "memory", "switching", "compiled", "others")
"""In the order in which they run: what takes long and is least asked for comes last, for the time limit to cut off."""


@dataclass(frozen=True)
class Language:
    """A language model, and the batch that it is trained on.

    Attributes:
        name: what the tables call it.
        shape: arguments of a LlamaConfig.
        rows: rows of the batch.
        length: tokens of a row.
        num_blocks: DiaBlo's N.
        source: a model to load; random weights of the shape where there is none, or where it cannot be had.
    """

    name: str
    shape: dict[str, Any]
    rows: int
    length: int
    num_blocks: int
    source: str | None = None


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        layers: inputs, outputs and tokens of the layers that are timed one by one.
        layer_blocks: DiaBlo's N for them.
        languages: the models whose steps are timed; the first one's memory and switching are measured too.
        kernels: inputs, outputs, N and tokens of the blocks' gradient.
        tables: how many layers of the same shape the diagonals are written of at once.
        copied_bytes: size of the copy that measures the memory's bandwidth.
        uncached_bytes: what the operands of one kernel must come to, lest they stay in the cache from call to call.
        rounds: measured rounds of everything.
        at_least: seconds that one measurement lasts at least.
    """

    layers: tuple[tuple[int, int, int], ...]
    layer_blocks: int
    languages: tuple[Language, ...]
    kernels: tuple[tuple[int, int, int, int], ...]
    tables: int
    copied_bytes: int
    uncached_bytes: int
    rounds: int
    at_least: float


# A quarter of the layers with a quarter of the vocabulary: the head's share of a step is then that of the whole model.
_LLAMA = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}

FULL = Sizes(
    layers=(
        (2048, 2048, 4096),
        (4096, 4096, 4096),
        (4096, 14336, 4096),
        (14336, 4096, 4096),
        (4096, 14336, 16384),
    ),
    layer_blocks=64,
    languages=(
        Language("8 layers of Llama-3-8B", _LLAMA, 4, 1024, 64),
        Language("SmolLM2-135M", _SMOLLM2, 16, 128, 16, "builtin:smollm2-135m"),
    ),
    kernels=(
        (4096, 14336, 64, 4096),
        (14336, 4096, 64, 4096),
        (4096, 4096, 64, 4096),
        (4096, 4096, 128, 4096),
        (2048, 2048, 64, 4096),
        (576, 1536, 64, 2048),
        (576, 576, 64, 2048),
        (576, 192, 64, 2048),
    ),
    tables=32,
    copied_bytes=2**30,
    uncached_bytes=2**28,
    rounds=7,
    at_least=0.03,
)

TINY = Sizes(
    layers=((64, 96, 32),),
    layer_blocks=8,
    languages=(
        Language("tiny Llama", {**_LLAMA, **_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}, 2, 16, 8),
    ),
    kernels=((64, 96, 8, 32),),
    tables=2,
    copied_bytes=2**20,
    uncached_bytes=0,
    rounds=2,
    at_least=0.0,
)
