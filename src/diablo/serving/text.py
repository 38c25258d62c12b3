"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a decoder writes for bytes that are no character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of a completion, piece by piece.

    All pieces together are the text as it stands behind the prompt, without special tokens, up to the first stop
    string.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the prompt's tokens. Some tokenizers take away the first space of a text by itself, so that the last one
            of these is decoded with it.
        stops: strings before which the text ends.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens = list(prompt[-1:])
        # Tokens from `_start` on are decoded together, and the text of those before `_told` has been told.
        self._start, self._told = 0, len(self._tokens)
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Take a token, and give the text that is certain by now; it may be empty."""
        self._tokens.append(token)
        return self._release(self._decoded(whole=False), is_end=False)

    def end(self) -> str:
        """The rest of the text, when no further token comes."""
        return "" if self.is_stopped else self._release(self._decoded(whole=True), is_end=True)

    def _decoded(self, *, whole: bool) -> str:
        before = self._text(self._tokens[self._start : self._told])
        text = self._text(self._tokens[self._start :])
        if not text.startswith(before):
            # As with a token that is text only by itself.
            before = ""
            text = self._text(self._tokens[self._told :])
        if text.endswith(_INCOMPLETE) and not whole:
            return ""
        if len(text) > len(before):
            self._start, self._told = self._told, len(self._tokens)
        return text[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, text: str, *, is_end: bool) -> str:
        """What of the held text and a new one may be told: no part of what may become a stop string."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            kept, self._held = self._held[: min(found)], ""
            return kept
        begins = 0 if is_end else self._begun()
        told, self._held = self._held[: len(self._held) - begins], self._held[len(self._held) - begins :]
        return told

    def _begun(self) -> int:
        """How many characters at the end of the held text could be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
