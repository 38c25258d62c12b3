"""From the body of a request to what the engine is asked for, within the server's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diablo.errors import UserError, did_you_mean
from diablo.serving.adapters import Adapter, Adapters
from diablo.serving.batch import Ask
from diablo.serving.prompts import Prompts, PromptsByAdapter
from diablo.serving.sampling import Sampling
from diablo.web.bodies import ChatRequest, CompletionRequest
from diablo.web.faults import ADAPTER_STATUS, ApiError, refused

T = TypeVar("T")
R = TypeVar("R")
# What OpenAI's API writes where nothing is said.
_COMPLETION_TOKENS = 16
# Seeds of the choices of one request: the first has the request's own, whatever the number of choices.
_STRIDE = 1_000_003


@dataclass(frozen=True)
class Bounds:
    """What a request may ask for.

    Attributes:
        context: the most tokens that the model takes; None where it has no limit.
        prompt: the most tokens of a prompt; None where the context alone limits it.
        written: the most tokens of an answer.
        kept: the most tokens that a row may come to need in the cache of keys and values.
        vocabulary: the number of tokens that there are.
    """

    context: int | None
    prompt: int | None
    written: int
    kept: int
    vocabulary: int


@dataclass(frozen=True)
class Asked:
    """What a request asks the engine for.

    Attributes:
        adapter: the adapter; None for the base model.
        asks: the rows: the choices of the first prompt, then those of the second, and so on.
        prompt_tokens: the tokens of all prompts.
    """

    adapter: Adapter | None
    asks: Sequence[Ask]
    prompt_tokens: int


class Asking:
    """Reads requests.

    Args:
        base: what the base model is called.
        adapters: the adapters.
        prompts: makes tokens of texts.
        bounds: what a request may ask for.
    """

    def __init__(self, base: str, adapters: Adapters, prompts: PromptsByAdapter, bounds: Bounds) -> None:
        self.base, self.adapters, self.prompts, self.bounds = base, adapters, prompts, bounds

    def adapter(self, name: str) -> Adapter | None:
        """The adapter of a name; None for the base model's.

        Raises:
            ApiError: nothing has that name, or the adapter is known to be broken.
        """
        if name == self.base:
            return None
        adapter = self.adapters.get(name)
        if adapter is None:
            close = did_you_mean(name, [self.base, *(each.name for each in self.adapters.known())])
            raise ApiError(
                404,
                f"model: there is no {name!r}; GET /v1/models lists all.{close}",
                param="model",
                code="model_not_found",
            )
        if adapter.fault is not None:
            raise ApiError(ADAPTER_STATUS, adapter.fault, param="model", code="adapter")
        return adapter

    def completion(self, body: CompletionRequest) -> Asked:
        """What a request to go on with texts asks for.

        Raises:
            ApiError: it asks for what cannot be had.
        """
        adapter = self.adapter(body.model)
        prompts = self._prompts(adapter)
        read = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                read.append(_told(prompts.completion, prompt))
            else:
                read.append((self._tokens(prompt), _told(prompts.completion, "x")[1]))
        if not read:
            raise refused("prompt: found none; give a text, or a list of texts.", "prompt")
        return self._asked(adapter, body, read, body.max_tokens or _COMPLETION_TOKENS, body.max_tokens, body.logprobs)

    def chat(self, body: ChatRequest) -> Asked:
        """What a request to answer in a conversation asks for.

        Raises:
            ApiError: it asks for what cannot be had.
        """
        adapter = self.adapter(body.model)
        read = [_told(self._prompts(adapter).conversation, [message.turn for message in body.messages])]
        if body.top_logprobs is not None and not body.logprobs:
            raise refused("top_logprobs: found a number without logprobs; set logprobs to true.", "top_logprobs")
        most = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._asked(adapter, body, read, self.bounds.written, most, logprobs)

    def _prompts(self, adapter: Adapter | None) -> Prompts:
        try:
            return self.prompts.of(adapter)
        except UserError as fault:
            raise ApiError(ADAPTER_STATUS, str(fault), param="model", code="adapter") from None

    def _tokens(self, tokens: Sequence[int]) -> list[int]:
        if not tokens or not all(isinstance(token, int) and 0 <= token < self.bounds.vocabulary for token in tokens):
            raise refused(
                f"prompt: found token ids of which one is outside of 0 to {self.bounds.vocabulary - 1}, or none; give "
                "ids of this model's tokens.",
                "prompt",
            )
        return list(tokens)

    def _asked(
        self,
        adapter: Adapter | None,
        body: CompletionRequest | ChatRequest,
        read: Sequence[tuple[Sequence[int], frozenset[int]]],
        default: int,
        given: int | None,
        logprobs: int | None,
    ) -> Asked:
        if given is not None and given > self.bounds.written:
            key = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
            raise refused(f"{key}: found {given}; this server writes up to {self.bounds.written} tokens.", key)
        asks = []
        for place, (tokens, stops) in enumerate(read):
            most = min(self._room(len(tokens), given), given or default)
            for choice in range(body.n):
                seed = None if body.seed is None else _seed(body.seed, place * body.n + choice)
                sampling = Sampling(body.temperature, body.top_p, seed)
                asks.append(Ask(tuple(tokens), most, stops, tuple(body.stop), sampling, logprobs))
        return Asked(adapter, asks, sum(len(tokens) for tokens, _ in read))

    def _room(self, prompt: int, given: int | None) -> int:
        """The most tokens that can be written behind a prompt of a number of tokens.

        Raises:
            ApiError: there is no room for one, or not for as many as were asked for.
        """
        bounds = self.bounds
        if bounds.prompt is not None and prompt > bounds.prompt:
            raise refused(
                f"The prompt has {prompt} tokens; this server reads up to {bounds.prompt}.", None, "prompt_too_long"
            )
        whole = min(bounds.kept, bounds.context or bounds.kept)
        room = whole - prompt
        if room < (given or 1):
            asked = f" and {given} more are asked for" if given is not None else ""
            raise refused(
                f"The prompt has {prompt} tokens{asked}; a prompt and its answer have room for {whole} in all.",
                None,
                "context_length_exceeded",
            )
        return room


def _told(function: Callable[[T], R], given: T) -> R:
    """What a function makes of a part of a request, whose faults are the request's."""
    try:
        return function(given)
    except UserError as fault:
        raise refused(str(fault), str(fault).partition(":")[0] if ":" in str(fault) else None) from None


def _seed(seed: int, choice: int) -> int:
    return (seed + choice * _STRIDE + 2**63) % 2**64 - 2**63
