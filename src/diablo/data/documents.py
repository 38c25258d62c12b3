"""Documents to rows of tokens: plain language modelling, where every token is trained on."""

from __future__ import annotations

from diablo.data.encoding import EncodedRow
from diablo.data.rows import Row
from diablo.data.special_text import TextTokenizer


def encode_document(row: Row, texts: TextTokenizer, max_length: int) -> list[EncodedRow]:
    """A document as rows of at most ``max_length`` tokens that all carry loss, with the end-of-text token behind it.

    A piece begins with the token that the piece before it ends with, from which its first new token is predicted: so
    every token of the document but the first carries loss once.

    Args:
        row: a row with a text. No chat template is put around it.
        texts: texts to tokens.
        max_length: tokens of a row, at least 2.

    Returns:
        The pieces in their order, each with the number of the document.
    """
    end = texts.tokenizer.eos_token_id
    tokens = texts.ids(texts.guard(row.text), add_special_tokens=True)
    if tokens[-1:] != [end]:
        tokens = [*tokens, end]
    pieces = [tokens[start : start + max_length] for start in range(0, len(tokens) - 1, max_length - 1)] or [tokens]
    spelled = texts.spelled([row.text])
    return [
        EncodedRow(row.number, piece, list(piece), spelled if index == 0 else (), source=row.source)
        for index, piece in enumerate(pieces)
    ]
