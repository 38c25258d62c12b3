"""Documents to rows of tokens: plain language modelling, where every token is trained on."""

from __future__ import annotations

from typing import Any

from diablo.data.encoding import EncodedRow
from diablo.data.rows import Row
from diablo.data.special_text import SpecialTextMode, TextTokenizer


def encode_document(
    row: Row, tokenizer: Any, max_length: int, special_text: SpecialTextMode = "keep"
) -> list[EncodedRow]:
    """A document as rows of at most ``max_length`` tokens that all carry loss, with the end-of-text token behind it.

    A piece begins with the token that the piece before it ends with, from which its first new token is predicted: so
    every token of the document but the first carries loss once.

    Args:
        row: a row with a text. No chat template is put around it.
        tokenizer: a transformers tokenizer.
        max_length: tokens of a row, at least 2.
        special_text: what becomes of text that spells a special token, see :class:`diablo.data.RowEncoder`.

    Returns:
        The pieces in their order, each with the number of the document.
    """
    texts = TextTokenizer(tokenizer, special_text)
    tokens = texts.ids(texts.guard(row.text), add_special_tokens=True)
    if tokens[-1:] != [tokenizer.eos_token_id]:
        tokens = [*tokens, tokenizer.eos_token_id]
    pieces = [tokens[start : start + max_length] for start in range(0, len(tokens) - 1, max_length - 1)] or [tokens]
    spelled = texts.spelled([row.text])
    return [
        EncodedRow(row.number, piece, list(piece), spelled if index == 0 else (), source=row.source)
        for index, piece in enumerate(pieces)
    ]
