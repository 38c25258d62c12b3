"""The attention and the switches for speed and memory, which a recipe sets as far as its device has them."""

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

    compile: bool = Field(False, description="true or false: compile the layers for training, by torch.compile")
    liger: bool = Field(False, description="true or false: take Liger's kernels for norms and gated layers, on a GPU")
    activation_offloading: bool = Field(
        False, description="true or false: keep what the backward needs in the CPU's memory while a GPU computes"
    )
