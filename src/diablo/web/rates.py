"""Limits on what each client asks for in a minute."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

# Whole nanoseconds, so that what is told to wait is enough to the last of them.
_SECOND = 1_000_000_000
_MINUTE = 60 * _SECOND


@dataclass
class Charge:
    """What was counted for a request.

    Attributes:
        at: when, in nanoseconds.
        amount: how much. It may be lowered later, when less was needed.
    """

    at: int
    amount: int


@dataclass(frozen=True)
class TooMuch:
    """That a request exceeds a limit.

    Attributes:
        seconds: after how many it would not, one or more; None where it always will.
    """

    seconds: int | None


@dataclass
class Rate:
    """A limit on what each client takes in any 60 seconds. To be used by one thread.

    Args:
        most: the limit.
        clock: gives the time in nanoseconds.
    """

    most: int
    clock: Callable[[], int] = time.monotonic_ns
    _charges: OrderedDict[Hashable, deque[Charge]] = field(default_factory=OrderedDict, init=False)

    def take(self, client: Hashable, amount: int) -> Charge | TooMuch:
        """Count something for a client, unless the limit would be exceeded; then nothing is counted."""
        now = self.clock()
        self._forget(now)
        charges = self._charges.get(client, deque())
        while charges and charges[0].at <= now - _MINUTE:
            charges.popleft()
        over = sum(charge.amount for charge in charges) + amount - self.most
        if amount > self.most:
            return TooMuch(None)
        for charge in charges:
            if over <= 0:
                break
            over -= charge.amount
            if over <= 0:
                return TooMuch(-(-(charge.at + _MINUTE - now) // _SECOND))
        charge = Charge(now, amount)
        charges.append(charge)
        self._charges[client] = charges
        self._charges.move_to_end(client)
        return charge

    def _forget(self, now: int) -> None:
        """Forget clients that have taken nothing for a minute, which stand first."""
        while self._charges:
            client, charges = next(iter(self._charges.items()))
            if charges[-1].at > now - _MINUTE:
                return
            del self._charges[client]
