"""A python that starts at once: a fork of a process that has imported the libraries does what it is told.

    forked_python.py SOCKET PYTHON ARGUMENTS

The streams, the working folder, the environment and signals are passed on, and the exit status comes back. What a fork
cannot do, such as an option of Python's or a further open file, the real PYTHON does.
"""

import array
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, python: str, arguments: list[str]) -> None:
    """Have it done; does not return."""
    # Streams are flushed when a fork ends.
    while arguments[:1] == ["-u"]:
        del arguments[0]
    # One more is the folder of this list itself.
    has_further_files = len(os.listdir("/proc/self/fd")) > 4
    if has_further_files or not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c")):
        os.execv(python, [python, *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    server.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    task = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    server.sendall(json.dumps(task).encode() + b"\n")
    for number in FORWARDED:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    status = int(server.makefile().readline())
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main(sys.argv[1], sys.argv[2], sys.argv[3:])
