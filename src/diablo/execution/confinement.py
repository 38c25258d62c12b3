"""What a process gives up for good before it runs code that nobody has read.

Linux has three mechanisms for this that need no privilege. They are put in force in this order: resource limits, a
Landlock ruleset for files, and a seccomp filter. The filter allows the system calls that a calculation needs and
refuses all others. So there are no new processes or threads, no sockets, and no signals to other processes. On other
systems there are only the resource limits.

Only the standard library is imported: this runs in an interpreter that has nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
# Before its third version, Landlock does not forbid truncating files outside of the folder. Such a version is not used.
_LANDLOCK_WITH_TRUNCATE = 3
_LANDLOCK_WITH_IOCTL = 5

# System calls that are always allowed: the name, the number on x86_64 and the number on aarch64 ("-" where aarch64 has
# no such call).
_CALLS = """
    read 0 63                  readv 19 65                pread64 17 67              write 1 64
    writev 20 66               pwrite64 18 68             close 3 57                 close_range 436 436
    lseek 8 62                 dup 32 23                  dup2 33 -                  dup3 292 24
    ioctl 16 29                stat 4 -                   fstat 5 80                 lstat 6 -
    newfstatat 262 79          statx 332 291              access 21 -                faccessat 269 48
    faccessat2 439 439         readlink 89 -              readlinkat 267 78          getdents64 217 61
    getcwd 79 17               chdir 80 49                fchdir 81 50               fsync 74 82
    fdatasync 75 83            ftruncate 77 46            fadvise64 221 223          sendfile 40 71
    umask 95 166               pipe 22 -                  pipe2 293 59               flock 73 32
    brk 12 214                 mmap 9 222                 munmap 11 215              mremap 25 216
    mprotect 10 226            madvise 28 233             clock_gettime 228 113      clock_getres 229 114
    clock_nanosleep 230 115    nanosleep 35 101           gettimeofday 96 169        time 201 -
    times 100 153              getrusage 98 165           alarm 37 -                 setitimer 38 103
    getitimer 36 102           rt_sigaction 13 134        rt_sigprocmask 14 135      rt_sigreturn 15 139
    rt_sigpending 127 136      rt_sigtimedwait 128 137    rt_sigsuspend 130 133      pause 34 -
    sigaltstack 131 132        restart_syscall 219 128    poll 7 -                   ppoll 271 73
    select 23 -                pselect6 270 72            epoll_create1 291 20       epoll_ctl 233 21
    epoll_wait 232 -           epoll_pwait 281 22         eventfd2 290 19            getpid 39 172
    getppid 110 173            gettid 186 178             getuid 102 174             geteuid 107 175
    getgid 104 176             getegid 108 177            getpgrp 111 -              getpgid 121 155
    getsid 124 156             uname 63 160               sysinfo 99 179             sched_yield 24 124
    sched_getaffinity 204 123  getrandom 318 278          getrlimit 97 163           futex 202 98
    exit 60 93                 exit_group 231 94
"""
# System calls that are allowed only where Landlock decides which files they reach.
_CALLS_ON_PATHS = "truncate 76 45  unlink 87 -  unlinkat 263 35  rename 82 -  renameat 264 38  renameat2 316 276"
# System calls that are allowed with some arguments only.
_CALLS_BY_ARGUMENT = """
    open 2 -  openat 257 56  fcntl 72 25  prlimit64 302 261  kill 62 129  tgkill 234 131  tkill 200 130  clone3 435 435
"""
_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_CALLS = 0x40000000
"""On x86_64, a second table of system calls (the x32 ABI) starts at this number."""


def confine(folder: str, limits: dict[str, int]) -> dict[str, bool]:
    """Confine this process as far as the system allows. This cannot be undone.

    Args:
        folder: the only place where the process may still write.
        limits: ``cpu_seconds``, ``memory_bytes``, ``file_bytes`` and ``open_files``.

    Returns:
        Whether each of ``landlock`` and ``seccomp`` is in force.

    Raises:
        OSError, ValueError: Linux refuses to set a resource limit.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["cpu_seconds"])
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, limits["open_files"])
    # The kernel counts all processes of the user. So a limit of one forbids every new process. It does not bind root.
    _limit(resource.RLIMIT_NPROC, 1)
    _limit(resource.RLIMIT_AS, limits["memory_bytes"])
    if not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return {"landlock": False, "seccomp": False}
    has_landlock = _restrict_files(folder)
    return {"landlock": has_landlock, "seccomp": _filter_calls(may_write=has_landlock)}


def die_with_parent() -> None:
    """Let the kernel end this process when the process that forked it ends. Only Linux can do this."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended. Only Linux can do this."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):
        # macOS refuses to limit the address space; describe_isolation does not promise it there.
        if sys.platform == "linux":
            raise


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, first: int, second: int = 0) -> bool:
    if sys.platform != "linux":
        return False
    arguments = (ctypes.c_ulong(argument) for argument in (first, second, 0, 0))
    return _libc().prctl(option, *arguments) == 0


def _restrict_files(folder: str) -> bool:
    """Let this process only read what Python needs, and read and write plain files in the folder.

    Returns:
        Whether Landlock is in force.
    """
    if sys.platform != "linux":
        return False
    syscall = _libc().syscall
    version = syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if version < _LANDLOCK_WITH_TRUNCATE:
        return False
    # The ruleset takes away all rights that the kernel knows. The rules give some of them back.
    handled = (1 << (16 if version >= _LANDLOCK_WITH_IOCTL else 15)) - 1
    attributes = struct.pack("=Q", handled)
    ruleset = syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    rules = [(path, _READ_FILE | _READ_DIR) for path in _readable_folders()]
    rules += [(path, _READ_FILE) for path in ("/dev/urandom", "/dev/zero", "/etc/localtime", "/etc/ld.so.cache")]
    rules += [("/dev/null", _READ_FILE | _WRITE_FILE | _TRUNCATE)]
    # The program may not make folders, links, pipes or devices, so that one flat folder is to be deleted afterwards.
    rules += [(folder, _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _REMOVE_FILE | _MAKE_REG)]
    try:
        for path, rights in rules:
            if not _allow(syscall, ruleset, path, rights):
                return False
        return syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _readable_folders() -> set[str]:
    own = {sys.base_prefix, sys.base_exec_prefix, *sys.path}
    return {path for path in own | {"/usr", "/lib", "/lib64"} if os.path.isdir(path)}


def _allow(syscall: Any, ruleset: int, path: str, rights: int) -> bool:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    rule = struct.pack("=Qi", rights, place)
    try:
        return syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0) == 0
    finally:
        os.close(place)


# The operations of a classic BPF program, and the answers that it can return.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW = (_RETURN, 0, 0, 0x7FFF0000)
_KILL = (_RETURN, 0, 0, 0x80000000)
_REFUSE = (_RETURN, 0, 0, 0x00050000 | errno.EPERM)
_ABSENT = (_RETURN, 0, 0, 0x00050000 | errno.ENOSYS)
_CALL, _ARCHITECTURE = (_LOAD, 0, 0, 0), (_LOAD, 0, 0, 4)

_Instruction = tuple[int, int, int, int]
"""Operation, number of instructions to skip if its condition holds, number to skip if it does not, and constant."""


def _argument(index: int, *, upper_half: bool = False) -> _Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * upper_half)


def _filter_calls(*, may_write: bool) -> bool:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _AUDIT_ARCHITECTURES or sys.maxsize < 2**32:
        return False
    program = b"".join(struct.pack("=HBBI", *line) for line in _filter(machine, os.getpid(), may_write=may_write))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_char_p))

    described = Program(len(program) // 8, program)
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(described))


def _filter(machine: str, pid: int, *, may_write: bool) -> Iterable[_Instruction]:
    """The seccomp filter as a BPF program."""
    yield _ARCHITECTURE
    yield from ((_IF_EQUAL, 1, 0, _AUDIT_ARCHITECTURES[machine]), _KILL, _CALL)
    if machine == "x86_64":
        yield from ((_IF_AT_LEAST, 0, 1, _X32_CALLS), _KILL)
    for number in _numbers(_CALLS + (_CALLS_ON_PATHS if may_write else ""), machine).values():
        yield from _where(number, _ALLOW)
    calls = _numbers(_CALLS_BY_ARGUMENT, machine)
    for name in ("kill", "tgkill", "tkill"):
        # abort and raise send a signal to the process itself, which is allowed. Other processes get none.
        yield from _where(calls[name], _argument(0), (_IF_EQUAL, 0, 1, pid), _ALLOW, _REFUSE)
    # F_SETOWN and F_SETOWN_EX make the kernel send signals to any process of the same user.
    yield from _where(calls["fcntl"], _argument(1), (_IF_EQUAL, 2, 0, 8), (_IF_EQUAL, 1, 0, 15), _ALLOW, _REFUSE)
    # Limits may be read but not set: root could raise them again.
    limits_are_read = (_argument(2), (_IF_EQUAL, 0, 3, 0), _argument(2, upper_half=True), (_IF_EQUAL, 0, 1, 0))
    yield from _where(calls["prlimit64"], *limits_are_read, _ALLOW, _REFUSE)
    writing = 0 if may_write else os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for name, index in (("open", 1), ("openat", 2)):
        if name in calls:
            yield from _where(calls[name], _argument(index), (_IF_ANY_BIT, 1, 0, writing), _ALLOW, _REFUSE)
    # "No such call" makes the C library try clone instead. That call is refused, and the C library reports the refusal.
    yield from _where(calls["clone3"], _ABSENT)
    yield _REFUSE


def _where(number: int, *body: _Instruction) -> Iterable[_Instruction]:
    """Instructions that run for one system call only. The last of them returns."""
    return ((_IF_EQUAL, 0, len(body), number), *body)


def _numbers(table: str, machine: str) -> dict[str, int]:
    words = table.split()
    column = 1 + list(_AUDIT_ARCHITECTURES).index(machine)
    rows = (words[first : first + 3] for first in range(0, len(words), 3))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}
