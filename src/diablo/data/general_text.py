"""General text, by whose loss forgetting is measured: how much less likely a model finds plain prose after training."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from diablo.data.encoding import EncodedRow
from diablo.data.faults import RowFault
from diablo.data.reading.files import read_records_of
from diablo.data.rows import is_unicode
from diablo.data.special_text import SpecialTextMode, TextTokenizer
from diablo.errors import UserError

BUILTIN_TEXT = "builtin"


def encode_general_text(
    source: str, tokenizer: Any, max_length: int, special_text: SpecialTextMode = "keep"
) -> list[EncodedRow]:
    """General text as rows whose every token carries loss, the first aside, which nothing predicts.

    No token that ends a text is added: when to stop is what training on a task is to change.

    Args:
        source: ``"builtin"`` for the paragraphs that come with the package, a ``.txt`` file of paragraphs between empty
            lines, or a ``.jsonl`` file of objects with a ``text``.
        tokenizer: a transformers tokenizer.
        max_length: tokens of a row; the rest of a longer text is left out.
        special_text: what becomes of text that spells a special token, see :class:`diablo.data.RowEncoder`.

    Raises:
        UserError: the file cannot be read, or holds no text.
    """
    rows = []
    texts = TextTokenizer(tokenizer, special_text)
    for number, text in enumerate(read_texts(source), start=1):
        found = texts.ids(texts.guard(text), add_special_tokens=True)
        tokens = [token for token in found if token != tokenizer.eos_token_id][:max_length]
        if len(tokens) > 1:
            rows.append(EncodedRow(number, tokens, tokens, texts.spelled([text])))
    if not rows:
        raise UserError(f"evaluation.general: {source} holds no text of two tokens or more.")
    return rows


def read_texts(source: str) -> list[str]:
    """The texts of a source, see :func:`encode_general_text`.

    Raises:
        UserError: the file cannot be read.
    """
    if source == BUILTIN_TEXT:
        source = str(resources.files("diablo") / "data" / "general" / "paragraphs.txt")
    path = Path(source)
    return _texts_of_jsonl(path) if path.suffix == ".jsonl" else _paragraphs(path)


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start} cannot be read).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def _texts_of_jsonl(path: Path) -> list[str]:
    texts = []
    for number, record in read_records_of(path):
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(record, RowFault) or not isinstance(text, str) or not is_unicode(text):
            raise UserError(f"{path}: row {number} is no object with a text; each must be one.")
        texts.append(text)
    return texts
