"""A server from its start to its end: the address, the watched folder, and what signals do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from diablo.serving.engine import Engine
from diablo.web.app import Server
from diablo.web.log import note


def run(
    engine: Engine,
    server: Server,
    taken: socket.socket,
    *,
    grace: float,
    look_every: float = 1.0,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests until SIGTERM or SIGINT.

    The first signal has new requests refused, and those that were accepted finished as far as that takes no more than
    ``grace`` seconds. The second one ends the server at once.

    Args:
        engine: the engine, which has been started and is stopped at the end.
        server: the endpoints.
        taken: the socket to listen at.
        grace: seconds.
        look_every: seconds between two looks at the watched folder.
        ready: called when requests are taken.
    """
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=2
    )
    try:
        _Uvicorn(config, engine, server, grace, look_every, ready).run([taken])
    finally:
        engine.stop()
        note("stopped")


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which ends when what was accepted is finished."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        server: Server,
        grace: float,
        look_every: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._engine, self._server = engine, server
        self._grace, self._look_every, self._ready = grace, look_every, ready
        self._signals: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; what it asks for is done in the event loop."""
        self._signals.append(sig)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to watch for signals and files."""
        await super().startup(sockets)
        self._tasks = [asyncio.create_task(self._watch_signals()), asyncio.create_task(self._watch_folder())]
        self._ready()

    async def _watch_signals(self) -> None:
        while not self._signals:
            await asyncio.sleep(0.05)
        begun = time.monotonic()
        note("closing", signal=signal.Signals(self._signals[0]).name, rows=self._engine.begun + self._engine.waiting)
        self._server.is_closing = True
        self._engine.close()
        while len(self._signals) < 2 and time.monotonic() - begun < self._grace and not self._is_idle():
            await asyncio.sleep(0.05)
        # Whoever is left is told before its connection ends.
        await asyncio.to_thread(self._engine.stop)
        self.should_exit = True

    def _is_idle(self) -> bool:
        return not (self._engine.begun or self._engine.waiting)

    async def _watch_folder(self) -> None:
        adapters: Any = self._engine.adapters
        while not self._server.is_closing:
            came, gone = await asyncio.to_thread(adapters.look)
            for adapter in came:
                note("adapter found", adapter=adapter.name, folder=str(adapter.folder))
            for name in gone:
                note("adapter gone", adapter=name)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(self._look_every)
