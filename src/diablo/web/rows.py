"""The rows of one request, from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from diablo.serving.adapters import Adapter
from diablo.serving.batch import Ask, Piece
from diablo.serving.engine import ClosedError, Engine, Fault, QueueFullError
from diablo.web.faults import ADAPTER_STATUS, ApiError
from diablo.web.rates import Charge

_STATUS = {"adapter": ADAPTER_STATUS, "closed": 503, "memory": 503, "error": 500}


class Rows:
    """The rows of a request, which the engine decodes. To be made in the event loop.

    Args:
        engine: the engine.
        adapter: whose rows they are; None for the base model.
        asks: what each is asked for.
        prompt_tokens: the tokens of the request's prompts.
        charge: what was counted for the request. It is lowered to what was needed when the rows have ended.

    Raises:
        ApiError: the queue is full, or the server is about to end.

    Attributes:
        written: tokens that each row has by now.
        ends: why each row has ended; None where it has not.
        first: seconds to the first token; None before it.
    """

    def __init__(
        self,
        engine: Engine,
        adapter: Adapter | None,
        asks: Sequence[Ask],
        prompt_tokens: int,
        charge: Charge | None = None,
    ) -> None:
        self._engine = engine
        self._charge = charge
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, Piece | Fault]] = asyncio.Queue()
        self.prompt_tokens = prompt_tokens
        self.written = [0] * len(asks)
        self.ends: list[str | None] = [None] * len(asks)
        self.first: float | None = None
        self._start = time.perf_counter()
        try:
            self._keys = engine.submit(adapter, [(ask, partial(self._take, index)) for index, ask in enumerate(asks)])
        except QueueFullError as error:
            message = f"The queue is full: {error} Ask again in a moment."
            raise ApiError(429, message, code="queue_full", retry_after=1) from None
        except ClosedError as error:
            raise ApiError(503, str(error), code="closing") from None

    def _take(self, index: int, told: Piece | Fault) -> None:
        """Called by the engine's thread."""
        # After the loop has ended nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._told.put_nowait, (index, told))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all rows as they come, each with the number of its row.

        Raises:
            ApiError: a row ended with a fault. The others are let go.
        """
        try:
            while not all(self.ends):
                index, told = await self._told.get()
                if isinstance(told, Fault):
                    raise ApiError(_STATUS[told.kind], told.message, code=told.kind)
                if self.first is None:
                    self.first = time.perf_counter() - self._start
                self.written[index], self.ends[index] = told.written, told.end
                yield index, told
        finally:
            if self._charge is not None:
                self._charge.amount = self.usage()["total_tokens"]
            # Also where the client has gone.
            if not all(self.ends):
                self._engine.cancel(self._keys)

    def usage(self) -> dict[str, Any]:
        """The tokens that were read and written, as OpenAI's API tells them."""
        written = sum(self.written)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }
