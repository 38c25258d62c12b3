"""What requests may ask for. What has no effect here is refused, unless it asks for what happens anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diablo.errors import did_you_mean, shortened
from diablo.web.faults import ApiError, refused

# The values at which settings of OpenAI's API ask for nothing that would be left out here.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_MOST_STOPS = 16
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: list[str] = []
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Who asks, and what the asker wants to remember: neither has a part in the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _sensible(cls, value: list[str]) -> list[str]:
        if len(value) > _MOST_STOPS or not all(value):
            raise ValueError(f"give up to {_MOST_STOPS} texts, none of them empty")
        return value


class CompletionRequest(_Request):
    """The body of a request to go on with texts."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as tokens."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        return [given] if is_one else list(given)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    # What clients send back of an answer that they got.
    name: str | None = None
    refusal: None = None

    @property
    def turn(self) -> dict[str, str]:
        """The turn as a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """The body of a request to answer in a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class LoadRequest(BaseModel):
    """The body of a request to load an adapter, with vLLM's names."""

    model_config = ConfigDict(extra="forbid")
    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """The body of a request to take an adapter away, with vLLM's names."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str
    lora_int_id: int | None = None


Body = TypeVar("Body", bound=BaseModel)


def parsed(kind: type[Body], given: Any) -> Body:
    """The body of a request.

    Args:
        kind: what it is to be.
        given: what came.

    Raises:
        ApiError: it is something else, or asks for what is not done here.
    """
    if not isinstance(given, dict):
        raise refused(f"The body is {shortened(given)}; send a JSON object.")
    # A null asks for the default, as with OpenAI.
    given = {key: value for key, value in given.items() if value is not None}
    for key, neutral in _NEUTRAL.items():
        if key in given and (value := given.pop(key)) not in neutral:
            raise _unsupported(key, value, neutral)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        # A key that is misspelled is told before the one that is missing for it.
        first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        raise _fault(kind, first) from None


def _unsupported(key: str, value: Any, neutral: tuple[Any, ...]) -> ApiError:
    allowed = " or ".join(map(repr, neutral))
    return refused(
        f"{key}: found {shortened(value)}, which this server does not do; leave it out, or give {allowed}.", key
    )


def _fault(kind: type[BaseModel], first: Any) -> ApiError:
    # The branches of a union come between the key and what is below it.
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        known = [*kind.model_fields, *_NEUTRAL]
        return refused(f"{key}: unknown key.{did_you_mean(key, known)}", key, "unknown_parameter")
    if first["type"] == "missing":
        return refused(
            f"{'.'.join(map(str, first['loc']))}: missing; it is required.", key, "missing_required_parameter"
        )
    where = ".".join(str(part) for part in first["loc"])
    why = first["msg"].removeprefix("Value error, ")
    return refused(f"{where}: found {shortened(first['input'])}; {why[:1].lower()}{why[1:]}.", key, "invalid_value")
