"""Programs that mean harm: each is scored as failed or timed out, the others go on, and nothing of it is left.

What a system lacks, ``describe_isolation`` does not promise, and what is not promised is not asserted.
"""

from __future__ import annotations

import errno
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import diablo.execution
from diablo.errors import UserError
from diablo.execution import Limits, Outcome, Program, confinement, describe_isolation, run_programs

SCRIPTS = Path(diablo.execution.__file__).parent
# The time on the clock is long enough for a machine that has other work, too; what computes ends by its own seconds.
QUICK = Limits(wall_seconds=20, cpu_seconds=1, memory_bytes=2**28)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs' folders are made; afterwards it is empty, and no process stands in it."""
    place = tmp_path / "programs"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []
    assert processes_in(place) == []


def processes_in(place: Path) -> list[str]:
    """Command lines of the processes whose working directory is, or was, in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").startswith(str(place)):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def run(source: str, test: str = "", limits: Limits = QUICK) -> Outcome:
    """The outcome of a program, beside which an innocent one has passed."""
    outcome, innocent = run_programs([Program(source, test), Program("x = 1", "assert x == 1")], limits=limits)
    assert innocent == Outcome("passed")
    return outcome


def needs(promise: str) -> None:
    if describe_isolation()[promise] is None:
        pytest.skip(f"nothing here prevents: {promise}")


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("def double(x):\n    return 2 * x\n", "assert double(2) == 4"),
        ("", ""),
        ("from __future__ import annotations\nx: y = 1\n", "assert x == 1"),
        ("import math, re, heapq, random, hashlib, datetime, decimal, statistics, json, copy, sqlite3", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n", "assert A(1) == A(1)"),
        ("import pickle\nclass A: pass\n", "assert type(pickle.loads(pickle.dumps(A()))) is A"),
        ("if __name__ == '__main__':\n    raise ValueError\n", ""),
        ("print('é' * 100)\n", ""),
        ("try:\n    input()\nexcept EOFError:\n    at_end = True\n", "assert at_end"),
        ("x = 1\n" * 170_000, "assert x == 1"),  # 1 MB
        ("import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\nos.kill(os.getpid(), signal.SIGUSR1)", ""),
        ("import os\n", "assert os.listdir('.') == [] and os.getcwd() == os.environ['HOME']"),
        ("import os\n", "assert set(os.environ) <= {'HOME', 'TMPDIR', 'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ"),
        ("import sys\n", f"assert not any({str(SCRIPTS)!r} in path or 'site-packages' in path for path in sys.path)"),
    ],
    ids=lambda text: text[:24],
)
def test_passes(source: str, test: str) -> None:
    assert run(source, test, Limits()) == Outcome("passed")


def test_plain_files_in_its_own_folder_are_allowed() -> None:
    if "nowhere" in (describe_isolation()["writing outside of its folder"] or ""):
        pytest.skip("programs may write nowhere here")
    source = (
        "import os, tempfile\nopen('a', 'w').write('b')\nos.rename('a', 'c')\ntempfile.TemporaryFile().write(b'')\n"
    )
    assert run(source, "assert open('c').read() == 'b'\nos.remove('c')\n") == Outcome("passed")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(): return 1", "AssertionError: not two"),
        ("f = None", "TypeError: 'NoneType' object is not callable"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys; sys.exit()", "SystemExit"),
        ("import os; os._exit(0)", "exited with status 0 before its tests had ended"),
        ("import os; os._exit(1)", "exited with status 1 before its tests had ended"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("def f(): return f()", "RecursionError: maximum recursion depth exceeded"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "ended by signal 40"),  # a real-time signal, which has no name
        ("import signal; signal.alarm(1); signal.pause()", "ended by SIGALRM"),
        ("def", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("x = '''", "SyntaxError: unterminated triple-quoted string literal"),
        ("x = 1\0", "SyntaxError: source code string cannot contain null bytes"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("\x80abc", "SyntaxError: invalid non-printable character"),
        ("(" * 100_000, "SyntaxError: too many nested parentheses"),
        ("x = bytearray(10 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
        ("class E(Exception):\n def __str__(self): raise self\nraise E", "an error that cannot be shown"),
        ("raise ValueError('\ud800' * 9999)", "UnicodeEncodeError"),
        ("raise ValueError(chr(0xd800) * 9999)", "ValueError: ???"),
    ],
    ids=lambda text: text[:24].replace("\0", "NUL").encode("ascii", "replace").decode(),
)
def test_fails(source: str, reason: str) -> None:
    if "null bytes" in reason and sys.version_info < (3, 11, 4):
        reason = "ValueError: source code string cannot contain null bytes"
    if "SIGSEGV" in reason and describe_isolation()["reading outside of Python and its folder"] is None:
        pytest.skip("where ctypes can be loaded from is not ours to say")
    outcome = run(source, "assert f() == 2, 'not two'")
    assert outcome.result == "failed"
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) < 400


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal\nfor number in range(1, 32):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import os\nwhile True: os.write(1, bytes(1 << 20))",
        "while True: print('flood' * 99999)",
        "import os\nos.closerange(0, 99)\nwhile True: pass",
        "x = 9 ** 9 ** 9",
        "import re; re.match('(a*)*b', 'a' * 60)",
    ],
    ids=lambda text: text[:24],
)
def test_endless(source: str) -> None:
    outcome = run(source)
    assert outcome.result == "timed out", outcome


def test_endless_waiting() -> None:
    (outcome,) = run_programs([Program("import time; time.sleep(999)", "")], limits=Limits(wall_seconds=1))
    assert outcome.result == "timed out"


def test_an_endless_test_times_out_too() -> None:
    assert run("x = 1", "while x: pass").result == "timed out"


@pytest.mark.parametrize("attempt", ["os.write(fd, b'passed')", "os.write(fd, bytes(1 << 24))", "os.close(fd)"])
def test_success_cannot_be_claimed_before_the_tests_ran(attempt: str) -> None:
    source = f"import os\nfor fd in range(3, 32):\n    try: {attempt}\n    except OSError: pass\nos._exit(0)"
    assert run(source).result == "failed"


def test_the_token_is_not_in_the_program_s_memory() -> None:
    # Whatever its frames and the collector reach has been searched for 32 hexadecimal digits.
    source = """
import gc, re, sys
frame, found = sys._getframe(), []
while frame:
    found += [v for v in frame.f_locals.values() if isinstance(v, str)]
    frame = frame.f_back
for thing in gc.get_objects():
    if type(thing) is dict:
        found += [v for v in list(thing.values()) if type(v) is str]
assert len(found) > 1000
assert not [text for text in found if re.fullmatch('[0-9a-f]{32}', text)]
"""
    assert run(source) == Outcome("passed")


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nwhile True: subprocess.Popen(['sleep', '999'])",
        "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, '-c', 'while True: pass'])",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(999)",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '999'], {})",
        "import os\nos.execv('/bin/sleep', ['sleep', '0'])",
        "import os\nassert os.system('true') == 0",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(999,)).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0",
    ],
    ids=lambda text: text[-32:],
)
def test_no_new_processes(source: str) -> None:
    needs("new processes")
    assert run(source).result == "failed"


@pytest.mark.parametrize(
    "source",
    [
        "os.kill(os.getppid(), 9)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "os.killpg(0, 9)",
        "os.kill(-1, 0)",
        "os.kill({parent}, 9)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        # The kernel would send the signal of a readable pipe to its owner.
        "r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    ],
)
def test_no_signals_to_others(source: str) -> None:
    needs("signals to others")
    imports = "import ctypes, fcntl, os, resource, signal\n"
    assert run(imports + source.format(parent=os.getpid())).result == "failed"


def attempts_to_write(place: Path) -> Iterator[str]:
    """Programs that change something in a folder that holds ``there``."""
    new, there = str(place / "new"), str(place / "there")
    yield f"open({new!r}, 'w').write('x')"
    yield f"open({there!r}, 'w')"
    yield f"open({there!r}, 'a').write('x')"
    yield f"open({there!r}, 'r+').write('x')"
    yield f"os.open({there!r}, os.O_RDONLY | os.O_TRUNC)"
    yield f"os.truncate({there!r}, 0)"
    yield f"os.remove({there!r})"
    yield f"os.rename({there!r}, {new!r})"
    yield f"os.rename({there!r}, 'mine')"
    yield f"os.link({there!r}, 'mine')"
    yield f"os.symlink({there!r}, 'mine'); open('mine', 'w')"
    yield f"os.symlink('x', {new!r})"
    yield f"os.mkdir({new!r})"
    yield f"os.rmdir({str(place)!r})"
    yield f"os.chmod({there!r}, 0)"
    yield f"os.utime({there!r}, (0, 0))"
    yield f"os.mkfifo({new!r})"
    yield f"os.chdir({str(place)!r}); open('new', 'w')"
    yield f"shutil.rmtree({str(place)!r})"


@pytest.mark.parametrize("number", range(19))
def test_nothing_outside_is_written(number: int, tmp_path: Path) -> None:
    needs("writing outside of its folder")
    place = tmp_path / "outside"
    place.mkdir()
    (place / "there").write_text("as it was")
    before = os.stat(place / "there")
    outcome = run(f"import os, shutil\n{list(attempts_to_write(place))[number]}")
    assert outcome.result == "failed"
    assert "Error" in outcome.reason
    assert [path.name for path in place.iterdir()] == ["there"]
    assert (place / "there").read_text() == "as it was"
    assert (os.stat(place / "there").st_mode, os.stat(place / "there").st_mtime) == (before.st_mode, before.st_mtime)


def test_every_attempt_to_write_is_tried(tmp_path: Path) -> None:
    assert len(list(attempts_to_write(tmp_path))) == 19


@pytest.mark.parametrize("where", ["/tmp", "/dev/shm", "/var/tmp", os.path.expanduser("~"), str(SCRIPTS), sys.prefix])
def test_nothing_is_left_in_common_places(where: str) -> None:
    needs("writing outside of its folder")
    path = Path(where) / f"left-by-a-program-{random.getrandbits(64):x}"
    assert run(f"open({str(path)!r}, 'w').write('x')").result == "failed"
    assert not path.exists()


def test_secrets_are_not_read(tmp_path: Path) -> None:
    needs("reading outside of Python and its folder")
    (tmp_path / "token").write_text("secret")
    for path in (tmp_path / "token", "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/maps"):
        assert run(f"open({str(path)!r}).read()").reason.startswith("PermissionError")


@pytest.mark.parametrize("catches", [False, True])
@pytest.mark.parametrize("kind", ["tcp", "unix", "udp"])
def test_no_network(kind: str, catches: bool, tmp_path: Path) -> None:
    needs("network")
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    transport = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
    with socket.socket(family, transport) as server:
        server.bind(str(tmp_path / "socket") if kind == "unix" else ("127.0.0.1", 0))
        if kind != "udp":
            server.listen()
        server.settimeout(0.2)
        source = (
            f"import socket\ntry:\n    s = socket.socket({int(family)}, {int(transport)})\n"
            f"    s.connect({server.getsockname()!r})\n    s.send(b'x')\n"
            f"except OSError:\n    {'pass' if catches else 'raise'}\n"
        )
        assert run(source).result == ("passed" if catches else "failed")
        with pytest.raises(TimeoutError):
            server.recv(1) if kind == "udp" else server.accept()


@pytest.mark.parametrize(
    "source",
    [
        "file = open('x', 'wb')\nwhile True: file.write(bytes(1 << 20))",
        "import itertools\nfor i in itertools.count(): open(str(i), 'wb').write(bytes(1 << 23))",
        "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()",
        "import os\nwhile True:\n    os.mkdir('x'); os.chdir('x')",
        "import itertools\nkept = [open(f'{i}', 'w') for i in itertools.count()]",
        "import os; os.rmdir(os.getcwd())",
        "import os, shutil; shutil.rmtree(os.getcwd())",
        "import os; os.chmod('.', 0); open('x', 'w')",
    ],
    ids=lambda text: text[-32:],
)
def test_its_folder_is_bounded_and_removed(source: str) -> None:
    needs("writing outside of its folder")
    assert run(source).result == "failed"


def test_many_at_once_keep_their_order() -> None:
    kinds = [
        (Program("x = 1", "assert x == 1"), "passed"),
        (Program("x = 1", "assert x == 2"), "failed"),
        (Program("import os; os._exit(0)", ""), "failed"),
    ]
    chance = random.Random(0)
    chosen = [chance.choice(kinds) for _ in range(22)]
    for place in (3, 11):
        chosen.insert(place, (Program("import time; time.sleep(99)", ""), "timed out"))
    assert len({result for _, result in chosen}) == 3
    told: list[tuple[int, int]] = []
    outcomes = run_programs(
        [program for program, _ in chosen],
        limits=Limits(wall_seconds=4),
        workers=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [outcome.result for outcome in outcomes] == [result for _, result in chosen]
    assert told == [(done, 24) for done in range(1, 25)]


def test_no_more_run_at_once_than_workers(folders: Path) -> None:
    most = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, len(list(folders.iterdir())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run_programs([Program("import time; time.sleep(0.05)", "")] * 12, workers=3)
    ended.set()
    watcher.join()
    assert 1 < most <= 3


def test_no_programs() -> None:
    assert run_programs([]) == []


def test_promises() -> None:
    promises = describe_isolation()
    status = Path("/proc/self/status")
    if status.exists() and "Seccomp:" in status.read_text() and platform.machine() in ("x86_64", "aarch64"):
        assert promises["network"] == promises["new processes"] == promises["signals to others"] == "seccomp"
    assert {"memory", "new processes", "network", "writing outside of its folder"} < set(promises)
    assert promises["endless running"]
    if promises["network"]:
        assert promises["signals to others"]
        assert promises["writing outside of its folder"]


def test_what_a_system_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    diablo.execution._warn_of_what_is_missing.cache_clear()
    monkeypatch.setattr(diablo.execution, "describe_isolation", lambda: {"memory": "RLIMIT_AS", "network": None})
    with pytest.warns(UserWarning, match=r"nothing keeps generated code from: network\. Run it in a container"):
        run_programs([Program("", "")])
    diablo.execution._warn_of_what_is_missing.cache_clear()


def test_a_system_that_cannot_fork_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_isolation.cache_clear()
    monkeypatch.delattr(os, "fork")
    with pytest.raises(UserError, match="on Linux and macOS only"):
        describe_isolation()


def test_a_program_whose_process_could_not_be_confined_is_not_run() -> None:
    outcome, in_force = diablo.execution._run(Program("", ""), Limits(cpu_seconds="many"))
    assert outcome == Outcome("failed", "its process could not be confined")
    assert in_force == {}


def script(body: str) -> tuple[int, str]:
    """Run Python with the scripts' folder at hand; its exit status, and what it says of a failure."""
    preamble = f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nimport confinement, os, supervisor, time\n"
    command = [sys.executable, "-S", "-c", preamble + body]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return result.returncode, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_grandchildren_in_sessions_of_their_own_are_ended() -> None:
    # What guards where new processes are not refused: to root, on a machine without a filter for its system calls.
    ended = script("""
confinement.adopt_orphans()
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.write(w, str(os.getpid()).encode())
        os.close(w)
        time.sleep(999)
    os._exit(0)
os.close(w)
pid = int(os.read(r, 99))
os.kill(pid, 0)
supervisor.end_descendants()
try:
    os.kill(pid, 0)
except ProcessLookupError:
    sys.exit(0)
sys.exit("it lives")
""")
    assert ended == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_without_landlock_nothing_is_written_anywhere(tmp_path: Path) -> None:
    needs("network")
    (tmp_path / "there").write_text("as it was")
    ended = script(f"""
os.chdir({str(tmp_path)!r})
import shutil
assert confinement._prctl(confinement._PR_SET_NO_NEW_PRIVS, 1)
assert confinement._filter_calls(may_write=False)
assert open("there").read() == "as it was"
for attempt in (
    lambda: open("new", "w"),
    lambda: open("there", "a"),
    lambda: os.open("there", os.O_RDONLY | os.O_TRUNC),
    lambda: os.truncate("there", 0),
    lambda: os.remove("there"),
    lambda: os.rename("there", "new"),
    lambda: os.mkdir("new"),
):
    try:
        attempt()
    except PermissionError:
        continue
    sys.exit("written")
""")
    assert ended == (0, "")
    assert (tmp_path / "there").read_text() == "as it was"


NUMBERS = {"x86_64": {"socket": 41, "fork": 57, "execve": 59}, "aarch64": {"socket": 198, "execve": 221}}
SHARED = {"clone": {"x86_64": 56, "aarch64": 220}, "io_uring_setup": {"x86_64": 425, "aarch64": 425}}


def answer(machine: str, call: int, *arguments: int, architecture: int | None = None, may_write: bool = True) -> int:
    """What the filter, carried out as BPF is defined, answers to a system call of process 1000."""
    lines = list(confinement._filter(machine, 1000, may_write=may_write))
    data = {0: call, 4: confinement._AUDIT_ARCHITECTURES[machine] if architecture is None else architecture}
    for index, argument in enumerate((*arguments, *(0,) * (6 - len(arguments)))):
        data[16 + 8 * index], data[20 + 8 * index] = argument & 0xFFFFFFFF, argument >> 32
    at = accumulator = 0
    while True:
        code, if_so, if_not, constant = lines[at]
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            accumulator = data[constant]
        else:
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: accumulator & constant != 0}
            at += if_so if holds[code] else if_not


ALLOWED, KILLED, REFUSED, ABSENT = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_of_each_machine(machine: str) -> None:
    column = {"x86_64": 0, "aarch64": 1}[machine]
    read, kill, prlimit, openat, fcntl = ((0, 63), (62, 129), (302, 261), (257, 56), (72, 25))
    assert answer(machine, read[column]) == ALLOWED
    refused = {**NUMBERS[machine], **{name: numbers[machine] for name, numbers in SHARED.items()}}
    for number in refused.values():
        assert answer(machine, number) == REFUSED
    assert answer(machine, 435) == ABSENT  # clone3
    assert answer(machine, kill[column], 1000) == ALLOWED
    for other in (1, 999, 0, -1 & 0xFFFFFFFFFFFFFFFF):
        assert answer(machine, kill[column], other, 9) == REFUSED
    assert answer(machine, prlimit[column], 0, 7, 0) == ALLOWED
    assert answer(machine, prlimit[column], 0, 7, 1 << 40) == REFUSED
    assert answer(machine, prlimit[column], 0, 7, 1) == REFUSED
    assert answer(machine, fcntl[column], 3, 1) == ALLOWED
    assert answer(machine, fcntl[column], 3, 8) == answer(machine, fcntl[column], 3, 15) == REFUSED
    for flags, allowed in ((0, ALLOWED), (os.O_CLOEXEC, ALLOWED), (os.O_WRONLY, REFUSED), (os.O_TRUNC, REFUSED)):
        assert answer(machine, openat[column], 0, 0, flags, may_write=False) == allowed
        assert answer(machine, openat[column], 0, 0, flags) == ALLOWED
    assert answer(machine, read[column], architecture=0x40000003) == KILLED  # 32-bit calls have other numbers


def test_the_second_table_of_x86_64_is_closed() -> None:
    assert answer("x86_64", 0x40000000) == KILLED


def test_a_supervisor_that_fails_by_itself_is_asked_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe_isolation()  # which asks a supervisor, the first time
    real, asked = diablo.execution._SUPERVISOR, tmp_path / "asked"
    failing = tmp_path / "failing.py"
    failing.write_text(
        f"import os, sys\nwith open({str(asked)!r}, 'a') as file:\n    file.write('.')\n"
        f"if os.path.getsize({str(asked)!r}) == 1:\n    sys.exit(1)\n"
        f"os.execv(sys.executable, [sys.executable, '-s', '-S', '-X', 'utf8', {str(real)!r}])\n"
    )
    monkeypatch.setattr(diablo.execution, "_SUPERVISOR", failing)
    assert run_programs([Program("x = 1", "assert x == 2")], limits=QUICK) == [Outcome("failed", "AssertionError")]
    assert asked.read_text() == ".."
