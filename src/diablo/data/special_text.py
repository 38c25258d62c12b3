"""Texts that spell a special token, such as ``</s>`` of a web page: found, and made tokens as the user says.

A tokenizer makes a special token of such text, whoever wrote it. That is right for what a chat template writes, and
mostly not meant where a row's own text does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from diablo.data.rows import MEND_UNICODE, is_unicode
from diablo.errors import UserError, shortened

SpecialTextMode = Literal["keep", "plain"]

# Unicode reserves these for use inside a program. A text that has them all the same loses them where it stays plain.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

# Characters of a context that can have a say in the tokens of what follows.
_REACH = 256


def describe_special_text(rows: int, tokens: Mapping[str, int], mode: SpecialTextMode) -> str:
    """How many rows spell which special tokens, and what becomes of that, in words.

    Args:
        rows: how many rows spell some.
        tokens: how often each token is spelled.
        mode: what becomes of it.
    """
    who = "1 row spells" if rows == 1 else f"{rows:,} rows spell"
    counts = ", ".join(f"{count:,} x {token}" for token, count in tokens.items())
    what = "which become these tokens" if mode == "keep" else "which stay ordinary text"
    return f"{who} special tokens, {what} (data.special_text: {mode}): {counts}"


class TextTokenizer:
    """Texts to tokens, with a say in what becomes of text that spells a special token.

    Only tokens that the tokenizer itself calls special count. Others that it adds whole to its vocabulary, such as
    ``<think>`` in many models, are words of the text like any other.

    Args:
        tokenizer: a transformers tokenizer.
        special_text: ``"keep"`` makes the special token of such text; ``"plain"`` makes the tokens of its characters.
    """

    def __init__(self, tokenizer: Any, special_text: SpecialTextMode = "keep") -> None:
        self.tokenizer = tokenizer
        self.special_text = special_text
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._added: dict[str, Any] = dict.fromkeys(filter(str.strip, tokenizer.all_special_tokens)) | added
        longest_first: list[str] = sorted(self._added, key=len, reverse=True)
        special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._special = re.compile(special)
        self._guarded = re.compile(f"{_OPEN}({special}){_CLOSE}|({special})|[{_OPEN}{_CLOSE}]")

    @property
    def special_tokens(self) -> Collection[str]:
        """The texts of the special tokens."""
        return self._added.keys()

    def spelled(self, texts: Iterable[str]) -> tuple[str, ...]:
        """The special tokens that texts spell, each as often as they do."""
        return tuple(token for text in texts for token in self._special.findall(text))

    def guard(self, text: str) -> str:
        """The text with what spells a special token marked, for :meth:`ids`, where that is to stay text.

        A chat template puts its own special tokens around a text; the marks tell them apart.
        """
        return text if self.special_text == "keep" else self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", text)

    def split_at(self, token: str, text: str) -> list[str]:
        """A text that is made of guarded texts, cut at each special token of that text that is to become one."""
        return re.split(f"(?<!{_OPEN}){re.escape(token)}", text)

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The tokens of a text that is made of guarded texts.

        Args:
            text: the text.
            add_special_tokens: also the tokens that the tokenizer puts before or behind any text.

        Raises:
            UserError: the tokenizer makes a special token of the text although it is to stay text.
        """
        if self.special_text == "keep" or _OPEN not in text:
            return self._native(text, add_special_tokens)
        segments, between = self._segments(text)
        ids, pending = list[int](), ""
        for before, (segment, spelled), after in zip(["", *between], segments, [*between, ""], strict=True):
            if not spelled:
                pending += segment + after
                continue
            # Between special tokens text is tokenized by itself in any case, so that nothing else changes.
            self._check_plain(spelled, segment)
            ids += self._native(pending) if pending else []
            ids += self._plain_after(before, self._stripped(before, segment, after), add_special_tokens)
            pending = after
        return ids + (self._native(pending) if pending else [])

    def encoded(self, text: str, pair: str | None = None, *, limit: int | None = None) -> Any:
        """What the tokenizer makes of a text, or of two, with its own special tokens around them.

        Args:
            text: the text, as somebody wrote it.
            pair: the second text.
            limit: the most tokens; the end of the longer text is cut off where there are more.

        Returns:
            ``input_ids``, and what else the tokenizer says of the tokens, such as ``token_type_ids``.

        Raises:
            UserError: as :meth:`ids`.
        """
        return self._encoded([text, *([] if pair is None else [pair])], (text, pair), limit)

    def encoded_words(self, words: Sequence[str], limit: int | None = None) -> tuple[list[int], list[int | None]]:
        """The tokens of words with a space between them, and where the first token of each word stands.

        Args:
            words: the words.
            limit: the most tokens, as for :meth:`encoded`.

        Returns:
            The tokens; and for each word the place of its first token, None where it has none or is cut off.

        Raises:
            UserError: as :meth:`ids`; or the tokenizer does not say where its tokens stand.
        """
        try:
            made = self._encoded(words, (" ".join(words), None), limit, return_offsets_mapping=True)
        except NotImplementedError:
            raise UserError(
                f"model: its tokenizer, {type(self.tokenizer).__name__}, does not say which characters a token is of, "
                "which labels of words need; take a model with a fast tokenizer."
            ) from None
        places: list[int | None] = []
        start = 0
        for word in words:
            end = start + len(word)
            of_word = (
                place for place, (first, last) in enumerate(made["offset_mapping"]) if first < end and last > start
            )
            places.append(next(of_word, None))
            start = end + 1
        return list(made["input_ids"]), places

    def _encoded(self, texts: Sequence[str], given: tuple[Any, Any], limit: int | None, **options: Any) -> Any:
        if limit is not None:
            options |= {"truncation": True, "max_length": limit}
        if self.special_text == "plain":
            options |= {"split_special_tokens": True}
            for text in texts:
                self._check_plain(self.spelled([text]), text)
        return self.tokenizer(*given, **options)

    def continuation(self, context: str, text: str) -> list[int]:
        """The tokens of a text that follows another, whose tokens are settled.

        By itself a text may have other tokens than there: some tokenizers put a space before every text that they are
        given. It is tokenized by itself only where its first token would have a part of the context in it.

        Args:
            context: what precedes the text, of guarded texts as for :meth:`ids`.
            text: the text.
        """
        near = context[-_REACH:]
        before, whole = self.ids(near), self.ids(near + text)
        return whole[len(before) :] if whole[: len(before)] == before else self._after_break(text)

    def _after_break(self, text: str) -> list[int]:
        """The tokens of a text as they are within a line, or by itself where that cannot be told."""
        before, whole = self.ids("\n"), self.ids("\n" + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.ids(text)

    def _native(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The tokens that the tokenizer itself makes of a text."""
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except TypeError:
            if is_unicode(text):
                raise
            raise UserError(f"The text {shortened(text)} is not valid Unicode; {MEND_UNICODE}.") from None

    def _segments(self, text: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
        """The text between the special tokens that a template wrote, and these tokens, one fewer.

        Returns:
            Each segment without its marks, and the special tokens that it spells; and the tokens between them.
        """
        first, *rest = self._guarded.split(text)
        segments, between = [(first, list[str]())], list[str]()
        for spelled, real, following in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            if real:
                between.append(real)
                segments.append((following, []))
                continue
            # A lone mark, which spells nothing, is left where a template has cut the text at one.
            segment, found = segments[-1]
            segments[-1] = (segment + (spelled or "") + following, found + [spelled] * bool(spelled))
        return segments, between

    def _stripped(self, before: str, text: str, after: str) -> str:
        """The text without the white space that the special tokens beside it swallow."""
        text = text.lstrip() if getattr(self._added.get(before), "rstrip", False) else text
        return text.rstrip() if getattr(self._added.get(after), "lstrip", False) else text

    def _plain_after(self, before: str, text: str, add_special_tokens: bool) -> list[int]:
        """The tokens of plain text after a special token, or at the start where there is none."""
        if before and self._put_apart(before):
            # This tokenizer puts a space before a text, but not after a special token; a line break holds its place.
            anchor = self._plain("\n")
            anchored = self._plain("\n" + text)
            if anchored[: len(anchor)] == anchor:
                return anchored[len(anchor) :]
        return self._plain(text, add_special_tokens=add_special_tokens)

    def _put_apart(self, special: str) -> bool:
        """Whether a text has other tokens by itself than after a special token."""
        alone = self._native("a")
        return self._native(f"{special}a")[-len(alone) :] != alone

    def _plain(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        options = {"add_special_tokens": add_special_tokens, "split_special_tokens": True}
        try:
            return list(self.tokenizer(text, **options)["input_ids"])
        except (TypeError, ValueError, NotImplementedError) as error:  # tokenizers in Python differ in how they refuse
            raise UserError(
                f"data.special_text: found plain, which {type(self.tokenizer).__name__} cannot do; set keep."
            ) from error

    def _check_plain(self, spelled: Iterable[str], text: str) -> None:
        """Some vocabularies have a special token among their words as well. What is unknown to them is no matter."""
        ids = self._plain(text)
        for token in set(spelled) - {self.tokenizer.unk_token}:
            if self.tokenizer.convert_tokens_to_ids(token) in ids:
                raise UserError(
                    f"data.special_text: found plain, but the tokenizer has {token!r} as a word as well; set keep, or "
                    "take it out of the rows."
                )
