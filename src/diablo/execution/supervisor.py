"""Runs one program that nobody has read with its test, and prints the outcome as JSON. A script, not a module.

The request comes as JSON on standard input. The process reads it and forks. The child confines itself and runs the
program. The parent waits, ends the child when its time is up, and judges. A random token proves that the test ran to
its end: the child takes it from a pipe only after the test, and sends it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import types
from typing import Any, NoReturn

_MESSAGE_BYTES = 4096
_REASON_CHARACTERS = 300
_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_AFTER_CLOSE = 0.002


def main() -> None:
    """Carry out the request on standard input."""
    import confinement  # pyrefly: ignore[missing-import]

    # sys.path[0] is the folder of this script. The import above needs it, and the program must not find it.
    del sys.path[0]
    request = json.load(sys.stdin)
    confinement.adopt_orphans()
    message_read, message_write = os.pipe()
    token_read, token_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(message_read)
        os.close(token_write)
        _run(request, token_read, message_write)
    os.close(message_write)
    os.close(token_read)
    os.set_blocking(message_read, False)
    # The token is made after the fork, so that the memory of the program's process never holds it before the test ends.
    token = os.urandom(16).hex()
    os.write(token_write, token.encode())
    json.dump(_supervise(pid, message_read, token, request["limits"]), sys.stdout)


def _run(request: dict[str, Any], token_pipe: int, message_pipe: int) -> NoReturn:
    """Confine this process and run the program in it."""
    import confinement  # pyrefly: ignore[missing-import]

    # The program can replace functions of the os module, so these are taken before it runs.
    read, write, leave = os.read, os.write, os._exit
    os.setsid()
    confinement.die_with_parent()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    in_force = confinement.confine(os.getcwd(), request["limits"])
    write(message_pipe, json.dumps(in_force).encode() + b"\n")
    failure = _failure(request["source"], request["test"])
    if failure is None:
        write(message_pipe, read(token_pipe, 100))
        leave(0)
    write(message_pipe, failure.encode("utf-8", "replace"))
    leave(1)


def _failure(program: str, test: str) -> str | None:
    """Run a program and its test in one namespace. Returns in words what was raised, or None."""
    # The module is not called __main__, so that a program's command line does not run: it is not what is tested.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        for source, name in ((program, "<program>"), (test, "<test>")):
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}".removesuffix(": ")[:_REASON_CHARACTERS]
        except BaseException:
            return "an error that cannot be shown"
    return None


def _supervise(pid: int, message_pipe: int, token: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Wait for the child, end it where it breaks a limit, and judge."""
    deadline = time.monotonic() + limits["wall_seconds"]
    message = _Message(message_pipe)
    ended_for = None
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if ended_for is None:
            if time.monotonic() > deadline:
                ended_for = ("timed out", f"ran for {limits['wall_seconds']} s")
            elif _is_too_full(limits):
                ended_for = ("failed", "wrote too much")
            if ended_for is not None:
                os.kill(pid, signal.SIGKILL)
        message.wait()
    end_descendants()
    message.read()
    in_force, _, said = message.text.decode("utf-8", "replace").partition("\n")
    if not in_force:
        return {"result": "failed", "reason": "its process could not be confined", "in_force": {}}
    result, reason = ended_for or _judge(status, usage, said, token, limits)
    return {"result": result, "reason": reason, "in_force": json.loads(in_force)}


class _Message:
    """What the child writes to its pipe. Everything is read, and only the beginning is kept."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.text = b""
        self.is_open = True

    def wait(self) -> None:
        """Read what there is, or wait a while for something. The end of the child closes the pipe and ends the wait."""
        if self.is_open:
            select.select([self.pipe], [], [], _SECONDS_BETWEEN_LOOKS)
            self.read()
        else:
            time.sleep(_SECONDS_AFTER_CLOSE)

    def read(self) -> None:
        """Read what there is, without waiting."""
        try:
            chunk = os.read(self.pipe, _MESSAGE_BYTES)
        except BlockingIOError:
            return
        self.is_open = bool(chunk)
        self.text = (self.text + chunk)[:_MESSAGE_BYTES]


def _judge(status: int, usage: Any, said: str, token: str, limits: dict[str, Any]) -> tuple[str, str]:
    """Result and reason for a child that ended by itself, or that the kernel ended at a limit."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and said == token:
        return "passed", ""
    # The limit goes by ticks of the clock, each of which counts as a whole for the process that runs then. On a machine
    # with other work these come to more than the time that was used.
    if code == -signal.SIGKILL and usage.ru_utime + usage.ru_stime >= 0.5 * limits["cpu_seconds"]:
        return "timed out", f"used {limits['cpu_seconds']} s of processor time"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return "failed", f"ended by {names.get(-code, f'signal {-code}')}"
    return "failed", said if code == 1 and said else f"exited with status {code} before its tests had ended"


def _is_too_full(limits: dict[str, Any]) -> bool:
    """Whether the folder holds more bytes or more files than the limits allow."""
    size = count = 0
    # Any of these files may vanish meanwhile. Without Landlock the folder itself may vanish too.
    with contextlib.suppress(OSError), os.scandir(".") as entries:
        for entry in entries:
            count += 1
            size += entry.stat(follow_symlinks=False).st_size
    return count > limits["folder_files"] or size > limits["folder_bytes"]


def end_descendants() -> None:
    """End the processes that the program left running. Where starting processes was refused, there are none.

    On Linux, ``adopt_orphans`` has made this process the parent of every orphan, at any depth and in any session.
    """
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            for child in _children():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)


def _children() -> list[int]:
    """Process ids of this process's children, including ended ones that nobody has waited for yet."""
    children = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                # The second field is the program's name in parentheses. It may hold any characters, also parentheses.
                parent = file.read().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            children.append(int(name))
    return children


if __name__ == "__main__":
    main()
