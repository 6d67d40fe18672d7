"""What the system call filter denies, call by call; and that `docs/sandbox.md` goes through all of them."""

from __future__ import annotations

import errno
import os
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.sandbox import seccomp as filters
from smallcoder_jax.sandbox.run import Call, run_python
from tests.sandbox.test_run import PRELUDE

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_not_listed_is_denied() -> None:
    """Every number that this kernel may know, one by one: EPERM, or ENOSYS for what is newer than the filter."""
    column = list(filters.ARCHITECTURES).index(os.uname().machine)
    listed = [*filters.ALLOWED.values(), *(numbers for numbers, _, _ in filters.CHECKED.values()), filters.MMAP,
              filters.CLONE, filters.CLONE3, filters.PRLIMIT]  # fmt: skip
    others = set(range(filters.NEWEST + 1)) - {numbers[column] for numbers in listed}
    others -= {335, 336}  # uretprobe and uprobe of x86_64: no filter is asked, and they end whoever calls them
    code = PRELUDE + "def f(x): return {n: code_of(libc.syscall(n, -1, -1, -1, -1, -1)) for n in x}"
    outcome = run_python(code, calls=[Call("f", (sorted(others),))])
    assert outcome.results[0].is_value(dict.fromkeys(others, errno.EPERM)), outcome
    calls = [Call("f", (number,)) for number in (435, 451, 9999)]  # clone3, and what is not known yet
    new = run_python(PRELUDE + "def f(x): return code_of(libc.syscall(x, 0, 0, 0))", calls=calls)
    assert [result.value for result in new.results] == [errno.ENOSYS] * 3


def verdict(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter returns, as the kernel would work it out."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at = loaded = 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, 8 * at)
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
            at += 1
            continue
        holds = {0x15: loaded == value, 0x25: loaded > value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
        at += 1 + (yes if holds else no)


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_filter_of_each_architecture(machine: str, column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter for the machine that this is not is worked out like the one for this machine."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    program, own = filters.seccomp_filter(), filters.ARCHITECTURES[machine]
    allow, deny, missing, pretend = 0x7FFF0000, 0x50001, 0x50026, 0x50000
    wanted = dict.fromkeys(range(filters.NEWEST + 1), deny)
    wanted |= {numbers[column]: allow for numbers in filters.ALLOWED.values() if numbers[column] is not None}
    wanted |= {filters.CLONE3[column]: missing, filters.NEWEST + 1: missing, 0x40000000: missing}
    looked_at = {filters.MMAP[column], filters.CLONE[column], filters.PRLIMIT[column]}
    looked_at |= {numbers[column] for numbers, _, _ in filters.CHECKED.values()}
    for number, result in wanted.items():
        assert number is not None
        assert number in looked_at or verdict(program, own, number) == result, number
    for numbers, index, values in filters.CHECKED.values():
        for value in {*values, *range(70), 1024, 1025, 1026, 1031, 0x5412, 0x53564D41}:
            expected = allow if value in values else pretend if (numbers, value) == (filters.FCNTL, 6) else deny
            assert verdict(program, own, numbers[column], *[0] * index, value | 5 << 32) == expected, (numbers, value)
    for number, arguments, expected in [
        (filters.MMAP, (0, 4096, 3, 0x22), allow), (filters.MMAP, (0, 4096, 3, 0x21), deny),
        (filters.MMAP, (0, 4096, 3, 0x23), deny), (filters.MMAP, (0, 4096, 3, 1), allow),
        (filters.CLONE, (0x3D0F00,), allow), (filters.CLONE, (0x10000011,), deny),
        (filters.PRLIMIT, (0, 7, 0, 1), allow), (filters.PRLIMIT, (0, 7, 1, 0), deny),
        (filters.PRLIMIT, (0, 7, 1 << 32, 0), deny)]:  # fmt: skip
        assert verdict(program, own, number[column], *arguments) == expected, (number, arguments)
    assert verdict(program, own ^ 1, 0) == 0x80000000  # calls of another architecture: killed


def test_the_page_on_system_calls_is_complete() -> None:
    """Each of the 362 calls of x86_64 up to 450 is allowed, looked at, or named as denied; and none is two of these."""
    page = (ROOT / "docs" / "sandbox.md").read_text().split("## Denied")[1].split("## Allowed")[0]
    looked_at = {*filters.CHECKED, "mmap", "clone", "clone3", "prlimit64"}
    assert looked_at <= set(re.findall(r"`(\w+)`", page))
    calls = [cell for row in page.splitlines()[4:] if row.startswith("|") for cell in row.split("|")[2:3]]
    named = re.findall(r"`([a-z_]\w*)`", " ".join(calls))
    denied = [name for name in named if name not in looked_at]
    allowed = [name for name, (number, _) in filters.ALLOWED.items() if number is not None]
    assert len(set(denied)) == len(denied)
    assert not set(denied) & set(allowed)
    assert len(denied) + len(allowed) + len(looked_at) == 362


# What belongs to no namespace: an expression, and what it has to be. `call` is a system call by its numbers.
OUTSIDE: dict[str, tuple[str, Any]] = {
    "asynchronous input and output, counted for the whole machine": (
        "code_of(call(206, 0, 64, ctypes.byref(ctypes.c_ulong())))", errno.EPERM),
    "io_uring": ("code_of(call(425, 425, 8, bytes(120)))", errno.EPERM),
    "inotify": ("[code_of(libc.inotify_init()), code_of(libc.inotify_init1(0))]", [errno.EPERM] * 2),
    "fanotify": ("code_of(libc.fanotify_init(0, 0))", errno.EPERM),
    "lock of a whole program": ("attempt(fcntl.flock, bash, fcntl.LOCK_SH | fcntl.LOCK_NB)", errno.EPERM),
    "lock of a program, waiting": ("attempt(fcntl.lockf, bash, fcntl.LOCK_SH)", errno.EPERM),
    "lock of a program by its description": (
        "[attempt(fcntl.fcntl, bash, n, struct.pack('hhqqi4x', 0, 0, 0, 0, 0)) for n in (37, 38)]", [errno.EPERM] * 2),
    "lease": ("attempt(fcntl.fcntl, bash, 1024, 0)", errno.EPERM),
    "lease of a file of its own": ("attempt(fcntl.fcntl, os.open('/tmp/mine', 65), 1024, 1)", errno.EPERM),
    "watch of a folder": ("attempt(fcntl.fcntl, os.open('/usr/bin', 0), 1026, 0x80000001)", errno.EPERM),
    "signals of a descriptor": ("[attempt(fcntl.fcntl, bash, n, 0) for n in (8, 10, 15)]", [errno.EPERM] * 3),
    "larger pipe": ("attempt(fcntl.fcntl, os.pipe()[1], 1031, 1 << 20)", errno.EPERM),
    "larger socket": ("attempt(socket.socketpair()[0].setsockopt, 1, 7, 1 << 20)", errno.EPERM),
    "sockets of other families": ("[code_of(libc.socketpair(n, 1, 0, bytes(8))) for n in (2, 16, 30)]",
                                  [errno.EPERM] * 3),
    "descriptors in messages": ("attempt(socket.socketpair()[0].sendmsg, [b'x'])", errno.EPERM),
    "datagram to an address": ("attempt(socket.socketpair(1, 2)[0].sendto, b'x', '/tmp/socket')", errno.EPERM),
    "pages in a pipe": ("[code_of(libc.vmsplice(pipe[1], 0, 0, 0)), code_of(libc.tee(pipe[0], pipe[1], 1, 0)), "
                        "code_of(libc.splice(bash, 0, pipe[1], 0, 1, 0))]", [errno.EPERM] * 3),
    "System V": ("[code_of(libc.shmget(0, 4096, 0o1600)), code_of(libc.semget(0, 1, 0o1600)), "
                 "code_of(libc.msgget(0, 0o1600))]", [errno.EPERM] * 3),
    "message queue": ("code_of(call(240, 180, b'mine', 66, 0o600, 0))", errno.EPERM),
    "keys": ("[code_of(call(250, 219, 0, -3, 1)), code_of(call(248, 217, b'user', b'a', b'b', 1, -3))]",
             [errno.EPERM] * 2),
    "performance counters": ("code_of(call(298, 241, bytes(128), 0, -1, -1, 0))", errno.EPERM),
    "bpf": ("code_of(call(321, 280, 0, bytes(128), 128))", errno.EPERM),
    "filters of its own": ("[code_of(libc.prctl(22, 2, 0, 0, 0)), code_of(call(317, 277, 1, 0, 0))]",
                           [errno.EPERM] * 2),
    "landlock": ("code_of(call(444, 444, ctypes.byref(ctypes.c_ulong(4)), 8, 0))", errno.EPERM),
    "hiding its descriptors": ("code_of(libc.prctl(4, 0, 0, 0, 0))", errno.EPERM),
    "userfaultfd": ("code_of(call(323, 282, 1))", errno.EPERM),
    "real time and scheduling": ("[attempt(os.sched_setscheduler, 0, n, os.sched_param(1)) for n in (1, 2, 3)]",
                                 [errno.EPERM] * 3),
    "a higher priority": ("attempt(os.setpriority, 0, 0, -5) in (1, 13)", True),
    "priority of others": ("attempt(os.setpriority, 0, x, 19)", errno.ESRCH),
    "processors of others": ("attempt(os.sched_setaffinity, x, [0])", errno.ESRCH),
    "signal to others": ("[attempt(os.kill, x, 0), attempt(os.pidfd_open, x)]", [errno.ESRCH] * 2),
    "priority of reading": ("code_of(call(251, 30, 1, 0, 0))", errno.EPERM),
    "core scheduling": ("code_of(libc.prctl(62, 1, 0, 0, 0))", errno.EPERM),
    "merged pages": ("code_of(libc.madvise(0, 4096, 12))", errno.EPERM),
    "dropped cache": ("attempt(os.posix_fadvise, bash, 0, 0, 4)", errno.EPERM),
    "disks": ("[code_of(libc.syncfs(bash)), code_of(call(162, 81)), code_of(libc.readahead(bash, 0, 4096))]",
              [errno.EPERM] * 3),
    "placement of memory": ("[code_of(call(237, 235, 0, 4096, 0, 0, 0, 0)), code_of(call(238, 237, 0, 0, 0))]",
                            [errno.EPERM] * 2),
    "locked memory": ("code_of(libc.mlockall(1))", errno.EPERM),
    "attributes of files": ("attempt(os.setxattr, '/tmp', 'user.a', b'x')", errno.EPERM),
    "settings of files": ("attempt(fcntl.ioctl, bash, 0x40086602, bytes(8))", errno.EPERM),
    "times of reading": ("[os.stat(bash).st_atime_ns, os.pread(bash, 1, 0), os.stat(bash).st_atime_ns][::2] == "
                         "[os.stat(bash).st_atime_ns] * 2", True),
    "timers": ("[1 for _ in range(9999) if code_of(libc.timer_create(1, None, bytes(8))) == 0].__len__() <= 512", True),
    "core dump": ("__import__('resource').getrlimit(4)", (1, 1)),
}  # fmt: skip


def test_what_belongs_to_no_namespace() -> None:
    """Each class of `docs/sandbox.md`."""
    body = ", ".join(f"{name!r}: {expression}" for name, (expression, _) in OUTSIDE.items())
    code = PRELUDE + (
        "import fcntl, struct\nbash, pipe = os.open('/usr/bin/bash', os.O_RDONLY), os.pipe()\n"
        "def call(x86, arm, *args): return libc.syscall(x86 if os.uname().machine == 'x86_64' else arm, *args)\n"
        f"def f(x): return {{{body}}}"
    )
    outcome = run_python(code, calls=[Call("f", (os.getpid(),))])
    assert outcome.results[0].is_value({name: expected for name, (_, expected) in OUTSIDE.items()}), outcome


def test_locks_do_not_reach_the_host() -> None:
    """A database is told that it has its lock, and works; the host takes the lock all the same."""
    code = (
        "import fcntl, sqlite3, time\nfile = open('/usr/bin/bash', 'rb')\n"
        "fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)\nbase = sqlite3.connect('/tmp/a.db')\n"
        "base.execute('create table t (x)')\nbase.execute('insert into t values (7)')\nbase.commit()\ntime.sleep(0.3)\n"
        "def f(): return sqlite3.connect('/tmp/a.db').execute('select x from t').fetchall()"
    )
    inode = f":{os.stat('/usr/bin/bash').st_ino} "
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_python, code, calls=[Call("f")])
        while not run.done():
            assert inode not in Path("/proc/locks").read_text()
            time.sleep(0.01)
        assert run.result().results[0].is_value([(7,)]), run.result()
