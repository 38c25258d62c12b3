"""Whose turn it is: adapters take turns on one model, and no one waits longer than a bound. There is no torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

# An adapter with this part of a batch, or more, has its turns for itself where not all rows fit into one batch. On a
# CPU a full mixed batch takes 1.2 to 1.3 times as long as one with the blocks in the weights, and so it writes as many
# tokens a second as one that is about three quarters full.
_ITS_OWN = 0.75


@dataclass(frozen=True)
class Limits:
    """What a turn may take, and what may stand at the same time.

    Attributes:
        rows: the most rows of a batch.
        steps: the forwards of a turn, after which another adapter goes first if one waits.
        tokens: the most tokens whose keys and values are kept at once, over all rows that have begun. A row counts with
            its prompt and all tokens that it may write.
        prefill: the most tokens of prompts, with their padding, that one forward reads. A single prompt may be longer.
        mixed: when adapters share a turn: ``"auto"``, as the scheduler says; ``"never"``; ``"always"`` where they can.
    """

    rows: int = 16
    steps: int = 32
    tokens: int = 65536
    prefill: int = 4096
    mixed: Literal["auto", "never", "always"] = "auto"


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

    @property
    def size(self) -> int:
        """The number of its rows."""
        return len(self.waiting) + len(self.begun)


class Scheduler:
    """Gives turns to adapters.

    Adapters that have work stand in a circle, in the order in which they came. A turn goes to the first one that can
    use it, which goes to the end afterwards. In a turn, rows of the adapter begin as long as the batch has a place. It
    ends when its adapter has nothing to do, or after ``limits.steps`` forwards if another adapter can use a turn. Rows
    that have begun are then put aside as they are, and go on in the next turn. So an adapter in front of which k others
    stand waits for at most ``k * limits.steps`` forwards.

    **Shared turns.** Adapters of one group can share a turn, in which rows of all of them stand in one batch. They do
    where all their rows have a place in one batch. Where they have not, an adapter that fills three quarters of a batch
    or more has its turns for itself, and the others share theirs. A shared turn belongs to the first adapter of the
    circle. Others join it in the circle's order while there is room, also in the middle of it. Afterwards those that
    had a forward in it go to the end of the circle, those whose last one was earlier first. The first forward is one of
    the adapter that the turn belongs to, and after a forward that reads prompts, all rows in the batch write a token.
    So the bound is the same.

    The second bound is that of memory. If the row that has waited longest does not fit into ``limits.tokens``, no other
    row begins before it, and it begins when enough rows have ended.

    Args:
        limits: the limits.
        group_of: tells what an adapter can share turns with: those of which it gives the same. None shares with nobody.

    Attributes:
        turn: the adapters of the present turn, that to which it belongs first.
        is_shared: whether the present turn is one that can be shared.
    """

    def __init__(self, limits: Limits, group_of: Callable[[Hashable], Hashable | None] = lambda _: None) -> None:
        self.limits = limits
        self.turn: list[Hashable] = []
        self.is_shared = False
        self._group_of = group_of
        self._lines: dict[Hashable, _Line] = {}
        self._circle: deque[Hashable] = deque()
        self._order: dict[Hashable, Job] = {}
        self._adapters: dict[Hashable, Hashable] = {}
        self._tokens = 0
        self._steps = 0
        self._has_read = False
        # For each adapter of the turn that has had a forward in it the number of the last one.
        self._served: dict[Hashable, int] = {}

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

    def begin_turn(self) -> list[Hashable]:
        """The adapters whose turn begins, or none. Those that had one go to the end of the circle."""
        # Only now, so that adapters which came in the last turn stand before those that had it.
        owner = self.turn[:1]
        for adapter in sorted(self._served, key=lambda own: (self._served[own], [own] == owner)):
            if adapter in self._lines:
                self._circle.remove(adapter)
                self._circle.append(adapter)
        self.turn = [adapter for adapter in self._circle if self._can_use(adapter)][:1]
        self.is_shared = bool(self._mates())
        self._steps, self._has_read, self._served = 0, False, {}
        if self.is_shared:
            self._let_join()
        return self.turn

    def goes_on(self) -> bool:
        """Whether the present turn goes on with a further forward."""
        users = [adapter for adapter in self.turn if self._can_use(adapter)]
        if not users:
            return False
        # One that is left alone is faster alone, and one that was alone shares as soon as there is another.
        if self.is_shared != (len(users) > 1 or bool(self._mates())):
            return False
        return self._steps < self.limits.steps or all(
            other == users[0] or not self._can_use(other) for other in self._circle
        )

    def admit(self) -> list[Job]:
        """The rows that begin now, those of an adapter in the order in which they came; none where there is no place.

        The caller reads their prompts in one forward. Where there are none, it has the rows of the turn that have begun
        write a token. It counts either with :meth:`step`.
        """
        if self.is_shared:
            self._let_join()
        admitted = [] if self._is_bound_to_write() else self._admitted()
        self._has_read = bool(admitted)
        served = [job.adapter for job in admitted] or [own for own in self.turn if self._begun(own)]
        self._served |= dict.fromkeys(served, self._steps)
        return admitted

    def step(self) -> None:
        """Count a forward of the present turn."""
        self._steps += 1

    def _is_bound_to_write(self) -> bool:
        """Whether the next forward of a shared turn has to be one in which rows that have begun write a token."""
        if not self.is_shared or not any(map(self._begun, self.turn)):
            return False
        first = self._lines.get(self.turn[0])
        return self._has_read or (self._steps == 0 and first is not None and not first.waiting)

    def _admitted(self) -> list[Job]:
        admitted: list[Job] = []
        longest, places = 0, self.limits.rows - sum(map(self._begun, self.turn))
        for line in (self._lines[adapter] for adapter in self.turn if adapter in self._lines):
            while line.waiting and len(admitted) < places:
                job = next(iter(line.waiting.values()))
                longest = max(longest, job.prompt)
                if not self._may_begin(job) or (admitted and longest * (len(admitted) + 1) > self.limits.prefill):
                    return admitted
                line.begun[job.key] = line.waiting.pop(job.key)
                del self._order[job.key]
                self._tokens += job.tokens
                admitted.append(job)
        return admitted

    def _let_join(self) -> None:
        """Let others into the present turn while the batch has places that nobody in it could take."""
        places = self.limits.rows - sum(map(self._size, self.turn))
        for other in self._mates():
            if other not in self.turn and places > 0 and self._begun(other) <= places:
                self.turn.append(other)
                places -= self._size(other)

    def _mates(self) -> list[Hashable]:
        """The adapters that can share the present turn with those in it, these among them; none where nobody can."""
        users = [adapter for adapter in self.turn if self._can_use(adapter)]
        group = self._group_of(users[0]) if users and self.limits.mixed != "never" else None
        if group is None:
            return []
        mates = [other for other in self._circle if self._group_of(other) == group and self._can_use(other)]
        if self.limits.mixed == "auto" and sum(map(self._size, mates)) > self.limits.rows:
            mates = [other for other in mates if self._size(other) < _ITS_OWN * self.limits.rows]
        return mates if users[0] in mates and len(mates) > 1 else []

    def _size(self, adapter: Hashable) -> int:
        line = self._lines.get(adapter)
        return 0 if line is None else line.size

    def _begun(self, adapter: Hashable) -> int:
        line = self._lines.get(adapter)
        return 0 if line is None else len(line.begun)

    def _can_use(self, adapter: Hashable) -> bool:
        line = self._lines.get(adapter)
        return line is not None and bool(
            line.begun or (line.waiting and self._may_begin(next(iter(line.waiting.values()))))
        )

    def _may_begin(self, job: Job) -> bool:
        free = self.limits.tokens - self._tokens
        oldest = next(iter(self._order.values()))
        return oldest.tokens <= free and job.tokens <= free
