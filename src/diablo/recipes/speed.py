"""Speed and memory beyond the method's own: what a recipe switches on where the device has it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from diablo.errors import UserError
from diablo.recipes.section import Section, explained

ATTENTIONS = (
    "auto",
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
"""The names that ``attention`` may have, beside those of kernels on the hub."""

# transformers loads kernels of other organisations only where it is told to trust them.
_ON_HUB = r"^kernels-community/[^/:@|]+$"


def _known_attention(value: str) -> str:
    if value.startswith("paged|"):
        with explained():
            raise UserError(
                f"attention: found {value!r}, which pages the cache of a server's requests, and training has no cache; "
                f"take {value.removeprefix('paged|')!r}."
            )
    if value not in ATTENTIONS and not re.match(_ON_HUB, value):
        raise ValueError("unknown")
    return value


_SCHEMA = {"anyOf": [{"enum": list(ATTENTIONS)}, {"type": "string", "pattern": _ON_HUB}]}
Attention = Annotated[str, AfterValidator(_known_attention), WithJsonSchema(_SCHEMA)]
"""What computes the attention."""


class Speed(Section):
    """Switches that change what a step costs, and not what it computes."""

    compile: bool = Field(
        False, description="true or false: whether torch.compile makes one graph of each layer's training"
    )
    liger: bool = Field(
        False, description="true or false: whether Liger's kernels compute the norms and gated layers, on a GPU"
    )
    activation_offloading: bool = Field(
        False, description="true or false: whether what the backward needs waits in the CPU's memory, of a GPU's run"
    )
