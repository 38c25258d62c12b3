"""Labelled and compared texts to tokens: for models with a head, which say something of a text and write none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diablo.data.encoding import IGNORED, EncodedRow
from diablo.data.rows import Row
from diablo.data.special_text import TextTokenizer

_BETWEEN = "\n"
"""What stands between two texts where the tokenizer has no token that separates them."""


def encode_labelled(
    row: Row, texts: TextTokenizer, labels: Sequence[str], limit: int | None, *, several: bool = False
) -> EncodedRow:
    """A text, two texts or the words of a text as tokens, with what is to be said of it.

    The tokenizer puts its own special tokens around a text. Two texts are put as it puts pairs, or with a line break
    between them where it has no separator. Of a word, its first token has the label.

    Args:
        row: a row with a label, or without one where it is to be found out.
        texts: texts to tokens.
        labels: the labels in their order; none where the label is a number.
        limit: the most tokens, where what is over them is cut off; None where nothing is.
        several: whether a text may have several labels.
    """
    index = {label: number for number, label in enumerate(labels)}
    if row.words:
        ids, places = texts.encoded_words(row.words)
        is_cut = limit is not None and len(ids) > limit
        if is_cut:
            ids, places = texts.encoded_words(row.words, limit)
        tags = [IGNORED] * len(ids)
        for place, label in zip(places, row.label if isinstance(row.label, tuple) else (), strict=False):
            if place is not None:
                tags[place] = index[label]
        return EncodedRow(row.number, ids, tags, texts.spelled(row.words), source=row.source, is_cut=is_cut)
    first, second = row.prompt, row.text_pair or None
    if second is not None and texts.tokenizer.sep_token_id is None:
        first, second = f"{first}{_BETWEEN}{second}", None
    made = texts.encoded(first, second)
    is_cut = limit is not None and len(made["input_ids"]) > limit
    if is_cut:
        made = texts.encoded(first, second, limit=limit)
    ids = list(made["input_ids"])
    target: Any = row.label
    if several:
        target = tuple(float(label in row.label) for label in labels) if isinstance(row.label, tuple) else None
    elif isinstance(row.label, str):
        target = index[row.label]
    return EncodedRow(
        row.number,
        ids,
        [IGNORED] * len(ids),
        texts.spelled([row.prompt, row.text_pair]),
        source=row.source,
        target=target,
        token_types=list(made["token_type_ids"]) if "token_type_ids" in made else None,
        is_cut=is_cut,
    )


def encode_compared(
    row: Row, texts: TextTokenizer, limit: int | None, prompts: tuple[str, str] = ("", "")
) -> EncodedRow:
    """A text as tokens, with those that it is compared with; see :class:`diablo.data.rows.Row`.

    Args:
        row: the row; a number in ``label`` says how near two texts are.
        texts: texts to tokens.
        limit: the most tokens of a text, where what is over them is cut off; None where nothing is.
        prompts: what is put before the first text, and before each of the others.
    """
    first, *others = (
        encode_labelled(replace(row, prompt=prompt + text, others=(), label=None), texts, (), limit)
        for prompt, text in zip((prompts[0], *[prompts[1]] * len(row.others)), (row.prompt, *row.others), strict=True)
    )
    is_cut = any(each.is_cut for each in (first, *others))
    special_text = tuple(token for each in (first, *others) for token in each.special_text)
    target = row.label if isinstance(row.label, float) else None
    return replace(first, others=tuple(others), target=target, is_cut=is_cut, special_text=special_text)
