"""The next token of each row of a batch, drawn by the row's own random numbers, and how likely it was."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Likely:
    """A token of a completion and what the model thought of it.

    Attributes:
        token: its id.
        logprob: the logarithm of its probability before temperature and top_p, in nats.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Sampling:
    """How the tokens of one row are chosen.

    Args:
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: the smallest set of the likeliest tokens whose probabilities reach this is drawn from.
        seed: of the row's random numbers, which no other row has a part in; drawn where None.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if self.seed is None else self.seed)

    def draw(self) -> float:
        """The row's next random number, from 0 to below 1."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: torch.Tensor, samplings: Sequence[Sampling]) -> list[int]:
    """The next token of each row.

    Args:
        logits: ``(rows, vocabulary)``, any floating dtype.
        samplings: how each row's token is chosen.
    """
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [index for index, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return chosen
    own = [samplings[index] for index in drawn]
    device = logits.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    scaled = logits[drawn].float() / column([each.temperature for each in own])
    probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probabilities.cumsum(dim=-1)
    # A token counts as long as those before it have not reached top_p; the first one always does.
    allowed = probabilities * ((reached - probabilities) < column([each.top_p for each in own]))
    allowed[:, 0] = probabilities[:, 0]
    reached = allowed.cumsum(dim=-1)
    marks = column([each.draw() for each in own]) * reached[:, -1:]
    # The likeliest tokens come first and those that are not allowed last: the mark is below the whole sum.
    places = (reached <= marks).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    places = torch.minimum(places, (allowed > 0).sum(dim=-1) - 1)
    for index, token in zip(drawn, tokens.gather(1, places[:, None])[:, 0].tolist(), strict=True):
        chosen[index] = token
    return chosen


def likelihoods(logits: torch.Tensor, chosen: Sequence[int], most: Sequence[int | None]) -> list[Likely | None]:
    """How likely the chosen tokens were.

    Args:
        logits: ``(rows, vocabulary)``.
        chosen: the token of each row.
        most: how many of the likeliest tokens are wanted beside it; None where nothing is.
    """
    wanted = [index for index, count in enumerate(most) if count is not None]
    found: list[Likely | None] = [None] * len(chosen)
    if not wanted:
        return found
    logprobs = logits[wanted].float().log_softmax(dim=-1)
    for row, index in zip(logprobs, wanted, strict=True):
        values, tokens = row.topk(min(most[index] or 0, row.shape[-1]))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        found[index] = Likely(chosen[index], float(row[chosen[index]]), top)
    return found
