"""Answers in the shapes of OpenAI's API, whole and as streams."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from diablo.serving.batch import Piece
from diablo.serving.sampling import Likely


class Answer(ABC):
    """The answer to a request, to which pieces of its rows are added.

    Args:
        model: what the request called the model.
        tokenizer: names tokens, where their probabilities are asked for.
        count: the number of rows.

    Attributes:
        id: what tells the answer from others.
        model: as given.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Any, count: int) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.model, self._tokenizer = model, tokenizer
        self._created = int(time.time())
        self._texts: list[str] = [""] * count
        self._likely: list[list[Likely]] = [[] for _ in range(count)]
        self._ends: list[str | None] = [None] * count
        # Where the next token of each row begins in its text.
        self._offsets = [0] * count

    def add(self, index: int, piece: Piece) -> None:
        """Take a piece of a row into the whole answer."""
        self._texts[index] += piece.text
        self._ends[index] = piece.end
        if piece.likely is not None:
            self._likely[index].append(piece.likely)

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer when all rows have ended."""
        choices = [
            self._choice(index, text, likely) | {"finish_reason": end}
            for index, (text, likely, end) in enumerate(zip(self._texts, self._likely, self._ends, strict=True))
        ]
        return self._object(self.whole_object, choices) | {"usage": usage}

    def openings(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""
        return []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a stream that tells a piece; None where there is nothing to tell."""
        likely = [] if piece.likely is None else [piece.likely]
        if not piece.text and not likely and piece.end is None:
            return None
        choice = self._part(index, piece.text, likely) | {"finish_reason": piece.end}
        return self._object(self.chunk_object, [choice])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk of a stream that tells the tokens."""
        return self._object(self.chunk_object, []) | {"usage": usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model, "choices": choices}

    @abstractmethod
    def _choice(self, index: int, text: str, likely: Sequence[Likely]) -> dict[str, Any]:
        """A row as it stands in the whole answer."""

    @abstractmethod
    def _part(self, index: int, text: str, likely: Sequence[Likely]) -> dict[str, Any]:
        """A piece of a row as it stands in a chunk."""

    def _text_of(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


class CompletionAnswer(Answer):
    """The answer to a request to go on with texts."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, text: str, likely: Sequence[Likely]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, likely)}

    _part = _choice

    def _logprobs(self, index: int, likely: Sequence[Likely]) -> dict[str, Any] | None:
        if not likely:
            return None
        texts = [self._text_of(each.token) for each in likely]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in likely],
            "top_logprobs": [{self._text_of(token): value for token, value in each.top} for each in likely],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """The answer to a request to answer in a conversation."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def openings(self) -> list[dict[str, Any]]:
        """A chunk for each row that says who speaks."""
        said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._object(self.chunk_object, [{"index": index, **said}]) for index in range(len(self._texts))]

    def _choice(self, index: int, text: str, likely: Sequence[Likely]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(likely)}

    def _part(self, index: int, text: str, likely: Sequence[Likely]) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text} if text else {}, "logprobs": self._logprobs(likely)}

    def _logprobs(self, likely: Sequence[Likely]) -> dict[str, Any] | None:
        if not likely:
            return None
        return {
            "content": [
                self._token(each.token, each.logprob) | {"top_logprobs": [self._token(*top) for top in each.top]}
                for each in likely
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def event(content: dict[str, Any] | str) -> str:
    """An event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n"
