"""New tokens: in the tokenizer, and as rows of the embedding and the output layer that are trained by themselves."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE, AddedToken

from diablo.errors import UserError, shortened
from diablo.models.folders import ADAPTER_CONFIG, read_settings
from diablo.models.loading import load_tokenizer
from diablo.tuner.tokens import ties_embeddings


@dataclass(frozen=True)
class TrainedTokens:
    """Tokens whose rows are trained, and the tokenizer that has them.

    Attributes:
        texts: their texts by id.
        pieces: for each that the base model's tokenizer does not have, the ids of the pieces that it cut the text into.
            A row starts as the mean of the rows of its pieces.
        special: the ids of those that are special tokens.
        rows_before: rows of the base model's embedding.
        rows: rows that the embedding needs, at least ``rows_before``.
        tokenizer: the tokenizer with the tokens.
        indices: PEFT's ``trainable_token_indices`` of a saved adapter; None where they follow from the model.
    """

    texts: Mapping[int, str]
    pieces: Mapping[int, Sequence[int]]
    special: frozenset[int]
    rows_before: int
    rows: int
    tokenizer: Any
    indices: Any = None

    @property
    def ids(self) -> list[int]:
        """The tokens' ids, in ascending order."""
        return sorted(self.texts)

    def token_indices(self, model: Any) -> dict[str, list[int]]:
        """PEFT's ``trainable_token_indices`` for a model: the ids by the full names of its layers.

        The output layer is among them where it has a weight of its own. A tied one follows the embedding.

        Raises:
            UserError: the output layer has a bias.
        """
        if self.indices is not None:
            return copy.deepcopy(self.indices)
        layers, head = [model.get_input_embeddings()], model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise UserError(
                f"new_tokens: the output layer of a {model.config.model_type} model has a bias, which PEFT's layer for "
                "trained rows would leave out; train with method: full, or leave new_tokens out."
            )
        if not ties_embeddings(model) and head is not None:
            layers.append(head)
        names = {id(module): name for name, module in model.named_modules()}
        return {names[id(layer)]: self.ids for layer in layers}

    def describe(self) -> str:
        """Which rows the tokens have, in words."""
        spare = [token for token in self.ids if token < self.rows_before]
        grown = f"the embedding grows from {self.rows_before:,} to {self.rows:,} rows"
        if self.rows == self.rows_before:
            return f"in spare rows of the embedding, which keeps its {self.rows:,}"
        return f"{len(spare)} in spare rows of the embedding, and {grown}" if spare else grown

    def record(self) -> dict[str, Any]:
        """The same as values of JSON."""
        return {
            "tokens": [
                {
                    "text": self.texts[token],
                    "id": token,
                    "special": token in self.special,
                    "pieces": list(self.pieces.get(token, ())),
                }
                for token in self.ids
            ],
            "rows_before": self.rows_before,
            "rows": self.rows,
        }


def add_tokens(name: str, tokenizer: Any, config: PretrainedConfig, tokens: Mapping[str, bool]) -> TrainedTokens:
    """Add tokens to a tokenizer, which is changed.

    Args:
        name: what the model is called, for messages.
        tokenizer: the model's tokenizer.
        config: the model's config.
        tokens: whether each token is special, by its text.

    Raises:
        UserError: the tokenizer has one of them already, or cannot take one.
    """
    known = tokenizer.get_vocab()
    if there := [text for text in tokens if text in known]:
        found = ", ".join(f"{shortened(text)} (token {known[text]})" for text in there)
        raise UserError(
            f"new_tokens: the tokenizer of {name!r} has {found} already; leave out what is there, which is trained "
            "like any other token."
        )
    pieces = {text: list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in tokens}
    for text, special in tokens.items():
        # Without normalization the token is found wherever the text stands. Some tokenizers put a mark for a space
        # before what they normalize, and would find it at the start of words alone.
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)], special_tokens=special)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in tokens}
    if unread := [text for text in tokens if tokenizer(text, add_special_tokens=False)["input_ids"] != [ids[text]]]:
        raise UserError(
            f"new_tokens: {type(tokenizer).__name__} does not read {shortened(unread[0])} as one token; choose a text "
            "that no other of the new tokens is a part of, without white space at its ends."
        )
    before = config.get_text_config().vocab_size
    return TrainedTokens(
        texts={ids[text]: text for text in tokens},
        pieces={ids[text]: own for text, own in pieces.items()},
        special=frozenset(ids[text] for text, special in tokens.items() if special),
        rows_before=before,
        rows=max(before, *(token + 1 for token in ids.values())),
        tokenizer=tokenizer,
    )


def tokens_of_adapter(adapter: Path, name: str, config: PretrainedConfig) -> TrainedTokens | None:
    """The tokens whose rows an adapter has trained, with the tokenizer that lies beside it where there is one.

    Args:
        adapter: the adapter's folder.
        name: its base model, a folder or an id on the hub.
        config: the base model's config.

    Returns:
        The tokens; None where the adapter has trained none.

    Raises:
        UserError: the adapter's settings are none, or a tokenizer cannot be loaded.
    """
    indices = read_settings(adapter).get("trainable_token_indices")
    if not indices:
        return None
    ids = {token for own in (indices.values() if isinstance(indices, dict) else [indices]) for token in own}
    base = load_tokenizer(name)
    tokenizer = load_tokenizer(str(adapter)) if (adapter / TOKENIZER_CONFIG_FILE).is_file() else base
    rows = max(len(tokenizer), config.get_text_config().vocab_size)
    if not all(isinstance(token, int) and 0 <= token < rows for token in ids):
        raise UserError(f"{adapter / ADAPTER_CONFIG} has trainable_token_indices that are no token ids.")
    texts = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ids)}
    known = base.get_vocab()
    added = tokenizer.added_tokens_decoder
    before = config.get_text_config().vocab_size
    return TrainedTokens(
        texts=texts,
        pieces={
            token: list(base(text, add_special_tokens=False)["input_ids"])
            for token, text in texts.items()
            if text not in known
        },
        special=frozenset(token for token in ids if token in added and added[token].special),
        rows_before=before,
        rows=max(before, *(token + 1 for token in ids)),
        tokenizer=tokenizer,
        indices=indices,
    )


def config_with_rows(config: PretrainedConfig, tokens: TrainedTokens | None) -> PretrainedConfig:
    """The config of the model with the rows that its tokens need; the same one where it has them."""
    if tokens is None or tokens.rows == tokens.rows_before:
        return config
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = tokens.rows
    return config


@torch.no_grad()
def give_rows(model: Any, tokens: TrainedTokens | None) -> Any:
    """Give a loaded model the rows of its new tokens.

    Each is the mean of the rows of the pieces that its text was cut into before, in the embedding and in an output
    layer of its own. The model then starts from about what it has read there before, and no random number is drawn for
    it.

    Returns:
        The model, which is changed.
    """
    if tokens is None:
        return model
    if tokens.rows > tokens.rows_before:
        model.resize_token_embeddings(tokens.rows, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(layer.weight): layer.weight for layer in layers if layer is not None}.values():
        rows = weight.detach()
        rows.copy_(with_rows(rows[: tokens.rows_before], tokens))
        for token, pieces in tokens.pieces.items():
            rows[token] = _mean(rows[list(pieces)] if pieces else rows[: tokens.rows_before])
    return model


def with_rows(weight: torch.Tensor, tokens: TrainedTokens) -> torch.Tensor:
    """A weight with as many rows as tokens need: ``(rows_before, hidden)`` to ``(rows, hidden)``.

    Those that are added are the mean of all others.
    """
    return torch.cat([weight, _mean(weight).expand(tokens.rows - tokens.rows_before, -1)])


def _mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.float().mean(0).to(rows.dtype)
