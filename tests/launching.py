"""Runs Python in forks of one process that has imported the libraries, which takes longer than what most tests run.

A fork differs from a process of its own in this alone: the libraries are there already, and have read the environment.
What is about imports, or about what a library writes when it is imported, is run by ``sys.executable``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shlex
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
RANKS, SHARED = "FORKED_PYTHON_RANKS", "FORKED_PYTHON"


@functools.cache
def forked_python() -> str:
    """The path of a program that does what Python does, in a fork; the process that is forked ends with this one.

    The workers of a session share the process that :func:`share_forks` has started. They are forks of it themselves
    where there is no GPU.
    """
    return os.environ.get(SHARED) or start_server()


def share_forks() -> None:
    """Start what is forked for this process, and for those that it starts."""
    os.environ[SHARED] = forked_python()


def start_server() -> str:
    """Start the process that is forked, and return the program's path."""
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    atexit.register(folder.cleanup)
    address, program = Path(folder.name, "socket"), Path(folder.name, "python")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    words = [sys.executable, "-I", "-S", Path(__file__).with_name("forked_python.py"), address, sys.executable]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    program.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno()), str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        pass_fds=[listener.fileno()],
    )
    atexit.register(server.kill)
    return str(program)


def start_python(
    *arguments: object,
    processes: int | None = None,
    settings: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.Popen[str]:
    """Start what ``python *arguments`` would run: a script, ``-m`` and a module, or ``-c`` and code.

    Args:
        arguments: the arguments of Python.
        processes: as how many ranks of one group, as ``torchrun`` starts them; None for one process without a group.
        settings: environment variables beside those of the tests.
        cwd: the working folder.
    """
    ranks = {} if processes is None else {RANKS: str(processes)}
    return subprocess.Popen(
        [forked_python(), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | ranks | dict(settings or {}),
    )


def run_python(
    *arguments: object,
    processes: int | None = None,
    settings: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    given: str = "",
) -> subprocess.CompletedProcess[str]:
    """What :func:`start_python` starts, once it has ended; ``given`` stands on its standard input."""
    with start_python(*arguments, processes=processes, settings=settings, cwd=cwd) as process:
        try:
            out, error = process.communicate(given)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def has_gpu() -> bool:
    """Whether there is a GPU of NVIDIA or AMD, without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def interpret_triton_where_there_is_no_gpu() -> None:
    """Triton reads this once, when a library imports it."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def serve(listener: socket.socket, program: str) -> list[str]:
    """Fork for every task; returns in the forks, with the arguments of Python. What they start is a fork again."""
    interpret_triton_where_there_is_no_gpu()
    for name in IMPORTED:
        __import__(name)
    # Forks share the memory of what they do not walk.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Standard input ends with the process of the tests.
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.executable = program
            return attend(connection)
        connection.close()
    os._exit(0)


def attend(connection: socket.socket) -> list[str]:
    """Fork for one task, and return in that fork; the other one passes on signals to it, and its exit status back."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    task = json.loads(connection.makefile().readline())
    process = os.fork()
    if process == 0:
        connection.close()
        begin(task, streams)
        return list(task["arguments"])
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(process)
    while ended not in select.select([ended, connection], [], [])[0]:
        numbers = connection.recv(64)
        for number in numbers or [signal.SIGKILL]:
            os.kill(process, number)
        # The program that had asked was killed.
        if not numbers:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def begin(task: Mapping[str, object], streams: list[int]) -> None:
    """Be the process of a task: its streams, folder, environment and rank."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(str(task["cwd"]))
    os.environ.clear()
    os.environ.update(task["environment"])
    ranks = os.environ.pop(RANKS, None)
    if ranks is not None:
        spread(int(ranks))


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
    end(serve(socket.socket(fileno=int(sys.argv[1])), program=sys.argv[2]))
