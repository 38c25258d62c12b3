"""Runs Python in forks of one process that has imported the libraries, which takes longer than what most tests run.

A fork differs from a process of its own in this alone: the libraries are there already, and have read the environment.
What is about imports, or about what a library writes when it is imported, is run by ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "diablo.training.trainers.making",
    "diablo.merging",
    "diablo.models.adapters",
    "diablo_cli",
    "matplotlib.pyplot",
)


class Launched:
    """What :func:`start_python` has started: a process, or the parent of several ranks."""

    def __init__(self, arguments: tuple[str, ...], folder: tempfile.TemporaryDirectory[str], pid: int) -> None:
        self.arguments, self.folder, self.pid = arguments, folder, pid
        self.ended: subprocess.CompletedProcess[str] | None = None

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it has written, once it has ended."""
        if self.ended is None:
            status = ask({"wait": self.pid})
            texts = [Path(self.folder.name, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
            self.ended = subprocess.CompletedProcess(self.arguments, status, *texts)
            self.folder.cleanup()
        return self.ended

    def send_signal(self, number: int) -> None:
        """Send it a signal while it has not been waited for."""
        if self.ended is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, whatever it does."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def start_python(
    *arguments: object,
    processes: int | None = None,
    settings: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    given: str = "",
) -> Launched:
    """Start what ``python *arguments`` would run: a script, ``-m`` and a module, or ``-c`` and code.

    Args:
        arguments: the arguments of Python.
        processes: as how many ranks of one group, as ``torchrun`` starts them; None for one process without a group.
        settings: environment variables beside those of the tests.
        cwd: the working folder.
        given: what stands on standard input.
    """
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "stdin").write_text(given, encoding="utf-8")
    texts = tuple(map(str, arguments))
    task = {"arguments": texts, "processes": processes, "cwd": str(cwd), "folder": folder.name}
    return Launched(texts, folder, ask({**task, "environment": {**os.environ, **(settings or {})}}))


def run_python(
    *arguments: object,
    processes: int | None = None,
    settings: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    given: str = "",
) -> subprocess.CompletedProcess[str]:
    """What :func:`start_python` starts, once it has ended."""
    return start_python(*arguments, processes=processes, settings=settings, cwd=cwd, given=given).wait()


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that is forked; it ends with the one that has started it."""
    command, environment = [sys.executable, __file__], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(task: Mapping[str, object]) -> int:
    """What the server answers: the process that a task has become, or the exit status of one that was waited for."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())
    except BaseException:
        # A test whose time was up: the next one must not read the answer that this one has not waited for.
        process.kill()
        server.cache_clear()
        raise


def serve() -> list[str] | None:
    """Fork for every task; returns in the forks, with the arguments of Python, and None where nobody asks any more."""
    tasks, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    # What a library writes when it is imported is no answer.
    os.dup2(2, 1)
    for name in IMPORTED:
        __import__(name)
    # Forks share the memory of what they do not walk.
    gc.collect()
    gc.freeze()
    for line in tasks:
        task = json.loads(line)
        if "wait" in task:
            answer = os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            tasks.close()
            answers.close()
            begin(task)
            return task["arguments"]
        print(answer, file=answers, flush=True)
    return None


def begin(task: Mapping[str, object]) -> None:
    """Be the process of a task: its streams, folder, environment and rank."""
    for number, (name, mode) in enumerate({"stdin": os.O_RDONLY, "stdout": WRITTEN, "stderr": WRITTEN}.items()):
        stream = os.open(os.path.join(str(task["folder"]), name), mode)
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(str(task["cwd"]))
    os.environ.clear()
    os.environ.update(task["environment"])  # type: ignore[call-overload]
    if task["processes"] is not None:
        spread(int(str(task["processes"])))


WRITTEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def spread(processes: int) -> None:
    """Fork the ranks of a group, and return in each of them; their parent ends all where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    running, status = set(), 0
    for rank in range(processes):
        process = os.fork()
        if process == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        running.add(process)
    while running:
        ended, result = os.wait()
        running.discard(ended)
        if result:
            status = status or os.waitstatus_to_exitcode(result)
            for other in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    os._exit(status & 0xFF)


def execute(arguments: list[str]) -> None:
    """Run what Python is told to, as Python does."""
    first, *rest = arguments
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def end(arguments: list[str]) -> None:
    """Run what Python is told to, and end as Python does, but that the libraries' objects are not freed one by one."""
    try:
        execute(arguments)
        status = 0
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        if asked.code is not None and not isinstance(asked.code, int):
            print(asked.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    told = serve()
    if told is None:
        os._exit(0)
    end(told)
