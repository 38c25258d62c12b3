"""Runs code that a model wrote, each program in a process of its own that can only calculate.

The page ``docs/code-execution.md`` says what a program is kept from, on which systems, and by which mechanism.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from diablo.errors import UserError

__all__ = ["Limits", "Outcome", "Program", "describe_isolation", "run_programs"]

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_MOST_WORKERS = 8
"""The most programs that run at once: each may take as much memory as a program is allowed."""
_SECONDS_OF_GRACE = 60
"""What a busy machine may need beyond a program's time, for the supervisor to start and to end the program."""


@dataclass(frozen=True)
class Program:
    """A program and the test that it must pass.

    Attributes:
        source: the whole program: what the model wrote, completed where it wrote only a part.
        test: code that runs after the program, in its namespace. The program is right where the test raises nothing.
    """

    source: str
    test: str


@dataclass(frozen=True)
class Limits:
    """What one program may use up.

    Attributes:
        wall_seconds: time from start to end.
        cpu_seconds: processor time; the reference harness of HumanEval allows three seconds.
        memory_bytes: address space, including that of the interpreter.
        file_bytes: size of each file that it writes.
        open_files: number of files open at once.
        folder_bytes: size of the program's folder, which is checked every twentieth of a second.
        folder_files: number of files in the program's folder, checked likewise.
    """

    wall_seconds: int = 10
    cpu_seconds: int = 3
    memory_bytes: int = 2**30
    file_bytes: int = 2**24
    open_files: int = 32
    folder_bytes: int = 2**26
    folder_files: int = 1000


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        result: ``"passed"`` where program and test ran to their end and raised nothing.
        reason: why it did not pass, in words; empty where it passed.
    """

    result: Literal["passed", "failed", "timed out"]
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program passed its test."""
        return self.result == "passed"


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Run programs with their tests, several at once, each in a fresh interpreter with an empty folder to itself.

    An error in a program is not raised here: it becomes the program's outcome. When the outcome is known, the program's
    folder and processes are gone.

    Args:
        programs: the programs to run.
        limits: what each program may use up; the default :class:`Limits` where None.
        workers: how many programs to run at once; as many as there are cores, but at most eight, where None.
        progress: called after each finished program with the number of finished programs and of all programs.

    Returns:
        The outcomes, in the order of the programs.

    Raises:
        UserError: this system cannot run them: it is not a POSIX system, or its process limits cannot be set.
    """
    if not programs:
        return []
    _warn_of_what_is_missing()
    outcomes: dict[int, Outcome] = {}
    pool = ThreadPoolExecutor(workers or min(_cores(), _MOST_WORKERS))
    try:
        started = {pool.submit(_run, program, limits or Limits()): i for i, program in enumerate(programs)}
        for future in as_completed(started):
            outcomes[started[future]] = future.result()[0]
            if progress is not None:
                progress(len(outcomes), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)
    return [outcomes[i] for i in range(len(programs))]


@functools.cache
def describe_isolation() -> dict[str, str | None]:
    """What keeps a program from doing harm on this system. An empty program is run to find out.

    Returns:
        For each harm, the mechanism that prevents it, or None where this system has none.

    Raises:
        UserError: this system cannot run programs.
    """
    if not hasattr(os, "fork"):
        raise UserError("Generated code can be run on Linux and macOS only; score such tasks there.")
    outcome, in_force = _run(Program("", ""), Limits())
    if not outcome.passed:
        raise UserError(f"Generated code cannot be run on this system: a program that does nothing {outcome.reason}.")
    is_linux = sys.platform == "linux"
    seccomp = "seccomp" if in_force["seccomp"] else None
    landlock = "landlock" if in_force["landlock"] else None
    # Landlock does not control signals to other processes, nor changes of files' modes and times. So without seccomp
    # nothing is promised in these lines, even where Landlock is in force.
    return {
        "endless running": "supervisor and RLIMIT_CPU",
        "memory": "RLIMIT_AS" if is_linux else None,
        "large files": "RLIMIT_FSIZE",
        "new processes": seccomp or ("RLIMIT_NPROC" if os.geteuid() != 0 else None),
        "signals to others": seccomp,
        "network": seccomp,
        "writing outside of its folder": seccomp and (landlock or "seccomp, writing nowhere"),
        "reading outside of Python and its folder": landlock,
    }


@functools.cache
def _warn_of_what_is_missing() -> None:
    missing = [name for name, mechanism in describe_isolation().items() if mechanism is None]
    if missing:
        warnings.warn(
            f"On this system nothing keeps generated code from: {', '.join(missing)}. "
            "Run it in a container or a virtual machine of its own; see docs/code-execution.md.",
            stacklevel=3,
        )


def _run(program: Program, limits: Limits) -> tuple[Outcome, dict[str, bool]]:
    """Run one program. Returns its outcome, and which mechanisms were in force."""
    request = json.dumps({**asdict(program), "limits": asdict(limits)})
    outcome, in_force, status = _supervise(request, limits)
    # A supervisor that failed by itself, such as where the system had no process left for it, says nothing about the
    # program: it is asked once more. One that a signal ended may have been ended by the program.
    return (outcome, in_force) if status <= 0 else _supervise(request, limits)[:2]


def _supervise(request: str, limits: Limits) -> tuple[Outcome, dict[str, bool], int]:
    """The outcome, the mechanisms in force and the exit status of one supervisor, which has a folder of its own."""
    # Without Landlock and seccomp a program may make a tree of folders that is too deep to delete.
    with tempfile.TemporaryDirectory(prefix="diablo-", ignore_cleanup_errors=True) as folder:
        supervisor = subprocess.Popen(
            # -s and -S hide the packages of the user and of the environment: only the standard library is left.
            [sys.executable, "-s", "-S", "-X", "utf8", str(_SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            # A fixed hash seed gives sets of strings the same order in every evaluation. A wrong program may depend on
            # that order.
            env={"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        with supervisor:
            try:
                output, _ = supervisor.communicate(request, timeout=limits.wall_seconds + _SECONDS_OF_GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(supervisor.pid, signal.SIGKILL)
                return Outcome("timed out", "its supervisor did not answer"), {}, -signal.SIGKILL
    return *_read(output), supervisor.returncode


def _read(output: str) -> tuple[Outcome, dict[str, bool]]:
    """The supervisor's verdict.

    Where signals are not prevented, the program may have ended the supervisor before it gave a verdict.
    """
    try:
        verdict: dict[str, Any] = json.loads(output)
    except ValueError:
        return Outcome("failed", "ended its supervisor"), {}
    return Outcome(verdict["result"], verdict["reason"]), verdict["in_force"]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
