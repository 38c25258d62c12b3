"""Runs scenarios in forks of one process, which has imported once what all of them need."""

from __future__ import annotations

import os
import traceback


def run_in_fork(scenario) -> str | None:
    """None, or the traceback of what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            scenario()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == 0 else said or f"ended with status {status}"


def run_all(scenarios) -> dict[str, str | None]:
    """Each scenario's name to what :func:`run_in_fork` returns."""
    return {scenario.__name__: run_in_fork(scenario) for scenario in scenarios}
