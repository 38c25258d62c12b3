"""Whose turn it is: adapters take turns on one model, and no one waits longer than a bound. There is no torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What a turn may take, and what may stand at the same time.

    Attributes:
        rows: the most rows of a batch.
        steps: the forwards of a turn, after which another adapter goes first if one waits.
        tokens: the most tokens whose keys and values are kept at once, over all rows that have begun. A row counts with
            its prompt and all tokens that it may write.
        prefill: the most tokens of prompts, with their padding, that one forward reads. A single prompt may be longer.
    """

    rows: int = 16
    steps: int = 32
    tokens: int = 65536
    prefill: int = 4096


@dataclass(frozen=True)
class Job:
    """A row that waits or has begun.

    Attributes:
        key: what tells it from others.
        adapter: what tells its adapter from others; the base model counts as one.
        prompt: the tokens of its prompt.
        tokens: these, and all that it may write.
    """

    key: Hashable
    adapter: Hashable
    prompt: int
    tokens: int


@dataclass
class _Line:
    """What one adapter has to do."""

    waiting: dict[Hashable, Job] = field(default_factory=dict)
    begun: dict[Hashable, Job] = field(default_factory=dict)


class Scheduler:
    """Gives turns to adapters.

    Adapters that have work stand in a circle, in the order in which they came. A turn goes to the first one that can
    use it, which goes to the end afterwards. In a turn, rows of the adapter begin as long as the batch has a place. It
    ends when its adapter has nothing to do, or after ``limits.steps`` forwards if another adapter can use a turn. Rows
    that have begun are then put aside as they are, and go on in the next turn. So an adapter in front of which k others
    stand waits for at most ``k * limits.steps`` forwards.

    The second bound is that of memory. If the row that has waited longest does not fit into ``limits.tokens``, no other
    row begins before it, and it begins when enough rows have ended.

    Args:
        limits: the limits.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lines: dict[Hashable, _Line] = {}
        self._circle: deque[Hashable] = deque()
        self._order: dict[Hashable, Job] = {}
        self._adapters: dict[Hashable, Hashable] = {}
        self._tokens = 0
        self._steps = 0
        self._last: Hashable | None = None

    @property
    def waiting(self) -> int:
        """The number of rows that have not begun."""
        return len(self._order)

    @property
    def begun(self) -> int:
        """The number of rows that have begun and not ended."""
        return len(self._adapters) - len(self._order)

    @property
    def tokens(self) -> int:
        """The tokens that the rows which have begun may come to need."""
        return self._tokens

    def add(self, job: Job) -> None:
        """Let a row wait.

        Raises:
            ValueError: it could never begin, or its key is there already.
        """
        if job.tokens > self.limits.tokens:
            raise ValueError(f"A row of {job.tokens} tokens exceeds the {self.limits.tokens} that can be kept.")
        if job.key in self._adapters:
            raise ValueError(f"A row {job.key!r} is there already.")
        if job.adapter not in self._lines:
            self._lines[job.adapter] = _Line()
            self._circle.append(job.adapter)
        self._lines[job.adapter].waiting[job.key] = job
        self._order[job.key] = job
        self._adapters[job.key] = job.adapter

    def remove(self, key: Hashable) -> None:
        """Forget a row that has ended, or whose client has gone; nothing happens where it is not there."""
        adapter = self._adapters.pop(key, None)
        line = self._lines.get(adapter)
        if line is None:
            return
        line.waiting.pop(key, None)
        self._order.pop(key, None)
        if (job := line.begun.pop(key, None)) is not None:
            self._tokens -= job.tokens
        if not line.waiting and not line.begun:
            del self._lines[adapter]
            self._circle.remove(adapter)

    def begin_turn(self) -> Hashable | None:
        """The adapter whose turn begins; the one before goes to the end of the circle. None where none can use it."""
        # Only now, so that adapters which came in the last turn stand before the one that had it.
        if self._last in self._lines:
            self._circle.remove(self._last)
            self._circle.append(self._last)
        self._last = next((adapter for adapter in self._circle if self._can_use(adapter)), None)
        self._steps = 0
        return self._last

    def goes_on(self, adapter: Hashable) -> bool:
        """Whether the turn of an adapter goes on with a further forward."""
        if not self._can_use(adapter):
            return False
        return self._steps < self.limits.steps or not any(
            self._can_use(other) for other in self._circle if other != adapter
        )

    def admit(self, adapter: Hashable) -> list[Job]:
        """The rows of an adapter that begin now, in the order in which they came; none where there is no place.

        The caller reads their prompts in one forward, and counts it with :meth:`step`.
        """
        line = self._lines.get(adapter)
        admitted: list[Job] = []
        longest = 0
        while line is not None and line.waiting and len(line.begun) < self.limits.rows:
            job = next(iter(line.waiting.values()))
            longest = max(longest, job.prompt)
            if not self._may_begin(job) or (admitted and longest * (len(admitted) + 1) > self.limits.prefill):
                break
            line.begun[job.key] = line.waiting.pop(job.key)
            del self._order[job.key]
            self._tokens += job.tokens
            admitted.append(job)
        return admitted

    def step(self) -> None:
        """Count a forward of the present turn."""
        self._steps += 1

    def _can_use(self, adapter: Hashable) -> bool:
        line = self._lines.get(adapter)
        return line is not None and bool(
            line.begun or (line.waiting and self._may_begin(next(iter(line.waiting.values()))))
        )

    def _may_begin(self, job: Job) -> bool:
        free = self.limits.tokens - self._tokens
        oldest = next(iter(self._order.values()))
        return oldest.tokens <= free and job.tokens <= free
