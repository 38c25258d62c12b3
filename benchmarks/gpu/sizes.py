"""The sizes of everything that is measured: on a GPU, and tiny ones for a rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PARTS = ("layers", "kernels", "steps", "memory", "switching", "compiled", "others")
"""The parts, in the order in which they run. Long and less important parts are last, where the time limit cuts off."""


@dataclass(frozen=True)
class Language:
    """A language model, and the batch that it is trained on.

    Attributes:
        name: its name in the tables.
        shape: arguments of a LlamaConfig.
        rows: rows of the batch.
        length: tokens of a row.
        num_blocks: DiaBlo's N.
        source: a model to load. The weights are random where it is None, or where the model cannot be loaded.
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
        layer_blocks: DiaBlo's N for these layers.
        languages: the models whose steps are timed. On the first one, memory and switching are measured too.
        kernels: inputs, outputs, N and tokens for the kernels.
        tables: number of weights of one shape whose diagonals are written at once.
        copied_bytes: size of the copy that measures the memory's bandwidth.
        uncached_bytes: the least size of all operands of one kernel together, so that none stays in the cache from call
            to call.
        rounds: number of measured rounds.
        at_least: the least number of seconds that one measurement takes.
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


# Llama-3-8B with a quarter of its layers and a quarter of its vocabulary. So the output layer's share of a step is the
# same as in the whole model.
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
