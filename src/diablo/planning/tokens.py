"""The tokens of a recipe whose rows are trained: added to the tokenizer, and looked for in the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from diablo.data.encoding import IGNORED, EncodedRow
from diablo.models.folders import adapter_folder
from diablo.models.loading import load_tokenizer
from diablo.models.vocabulary import TrainedTokens, add_tokens, tokens_of_adapter
from diablo.recipes.recipe import Recipe

_MOST_NAMED = 8
"""Tokens that a line of a plan names."""


def tokens_of_recipe(recipe: Recipe, name: str, config: PretrainedConfig) -> tuple[Any, TrainedTokens | None]:
    """The tokenizer of a recipe, and the tokens whose rows are trained: new ones, or those of the adapter.

    Args:
        recipe: the recipe.
        name: folder or hub id of its model.
        config: the model's config.

    Returns:
        The tokenizer with these tokens, and the tokens; None where all rows are frozen, or all trained alike.

    Raises:
        UserError: the tokenizer has a new token already, or cannot be loaded.
    """
    if recipe.adapter is not None:
        tokens = tokens_of_adapter(adapter_folder(recipe.adapter), name, config)
        tokenizer = load_tokenizer(name) if tokens is None else tokens.tokenizer
    else:
        tokens, tokenizer = None, load_tokenizer(name)
        if recipe.new_tokens is not None:
            new = {token.text: token.special for token in recipe.new_tokens}
            tokens = add_tokens(name, tokenizer, config, new)
    if recipe.chat_template is not None:
        tokenizer.chat_template = recipe.chat_template
    return tokenizer, tokens


class TokenCounts:
    """How often tokens occur in the training rows.

    Args:
        tokens: the tokens.
        rows: the training rows.
        plain: whether text that spells a special token stays text.
    """

    def __init__(self, tokens: TrainedTokens, rows: Sequence[EncodedRow], *, plain: bool) -> None:
        self.tokens = tokens
        self._plain = plain
        ids = set(tokens.ids)
        self._all = Counter(token for row in rows for token in row.input_ids if token in ids)
        labels = (label for row in rows for label in row.labels[1:])
        self._supervised = Counter(label for label in labels if label != IGNORED and label in ids)

    @property
    def absent(self) -> str:
        """Which tokens occur in no training row, and what that means; empty where all occur."""
        absent = [token for token in self.tokens.ids if not self._all[token]]
        if not absent:
            return ""
        verb, stays = ("occurs", "its row is") if len(absent) == 1 else ("occur", "their rows are")
        text = f"{self._named(absent)} {verb} in no training row, so that {stays} not learned"
        if self._plain and self.tokens.special.intersection(absent):
            text += "; data.special_text: plain keeps the text of special tokens text"
        return text

    def lines(self) -> Iterator[str]:
        """What a plan says, in lines of two columns."""
        named = [f"{self.tokens.texts[token]} {self._all[token]:,} x" for token in self.tokens.ids]
        if len(named) > _MOST_NAMED:
            named = [*named[:_MOST_NAMED], f"and {len(named) - _MOST_NAMED} more"]
        yield f"trained tokens      {', '.join(named)} in the training rows; {self.tokens.describe()}"
        if self.absent:
            yield f"never trained       {self.absent}"

    def record(self) -> dict[str, Any]:
        """The same as values of JSON."""
        record = self.tokens.record()
        for token in record["tokens"]:
            token |= {"count": self._all[token["id"]], "supervised": self._supervised[token["id"]]}
        return record

    def _named(self, ids: Sequence[int]) -> str:
        more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
        return ", ".join(self.tokens.texts[token] for token in ids[:_MOST_NAMED]) + more
