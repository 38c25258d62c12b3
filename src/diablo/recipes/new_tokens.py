"""The key ``new_tokens`` of a recipe: texts that become tokens of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from diablo.errors import UserError, shortened
from diablo.recipes.methods import AnyMethod
from diablo.recipes.section import Section


class NewToken(Section):
    """A text that becomes a token of its own."""

    text: str = Field(description="a text: what stands for the token in rows and prompts")
    special: bool = Field(False, description="true or false: a special token, without which answers are shown")


def _as_tokens(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [{"text": each} if isinstance(each, str) else each for each in value]


NewTokens = Annotated[
    list[NewToken] | None,
    BeforeValidator(_as_tokens, json_schema_input_type=list[str | NewToken] | None),
]


def check_new_tokens(tokens: list[NewToken]) -> None:
    """Check the texts, without a tokenizer.

    Raises:
        UserError: there are none, one is empty, or one is there twice.
    """
    texts = [token.text for token in tokens]
    if not texts:
        raise UserError("new_tokens: found an empty list; name at least one token, or leave it out.")
    if blank := [text for text in texts if not text or text != text.strip()]:
        raise UserError(
            f"new_tokens: found {shortened(blank[0])}; give a text that is not empty, without white space at its ends."
        )
    if twice := [text for number, text in enumerate(texts) if text in texts[:number]]:
        raise UserError(f"new_tokens: found {shortened(twice[0])} twice; name each token once.")


def check_trains_tokens(methods: Sequence[AnyMethod]) -> None:
    """Check that methods can train the rows of new tokens.

    Raises:
        UserError: one cannot.
    """
    if refused := [method.title for method in methods if not method.trains_tokens]:
        raise UserError(
            f"new_tokens: PEFT does not train, or does not save, rows of tokens beside {', '.join(refused)}; take "
            "diablo, lora, rslora, dora or full as the method (or as --methods of a comparison), or leave new_tokens "
            "out."
        )
    if any(getattr(method, "options", {}).get("trainable_token_indices") for method in methods):
        raise UserError(
            "new_tokens: found beside method.trainable_token_indices, which says which rows are trained; give one of "
            "the two."
        )
