"""Runs one sandbox from start to end: its limits, its view of this machine, its launcher and its output."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.sandbox import launch
from smallcoder_jax.sandbox.seccomp import seccomp_filter

# How a run ended: by itself ("finished", or "exited" before its harness was done), by a signal, at a limit (see
# `Limits`), or because the code wrote records that its harness would not have written ("forged").
Ended = Literal["finished", "exited", "signal", "wall", "cpu", "memory", "output", "results", "forged"]

ENVIRONMENT = {"PATH": "/sandbox/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
SYSTEM = ("/usr/bin", "/usr/lib", "/usr/lib64", "/bin", "/lib", "/lib64", "/usr/share/zoneinfo")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
NOBODY = 65534
GRACE_S = 10.0  # after the limit of the wall clock, until the launcher itself is killed
MAX_STATUS = 65536
# Starts the launcher without the package's `__init__`, which looks for installed packages; here there are none.
START = """
import sys, types
sys.modules["smallcoder_jax"] = types.ModuleType("smallcoder_jax")
sys.modules["smallcoder_jax"].__path__ = [sys.argv[3]]
from smallcoder_jax.sandbox import launch
launch.main()
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one run.

    `memory_bytes` limits the address space of each process, and for all processes together the sum of pages, page
    tables, mappings, `/tmp`, and pipes and sockets as if they were full. Shared anonymous memory (`mmap.mmap(-1, n)`)
    is denied.
    """

    wall_s: float = 10.0
    cpu_s: int = 10  # of each process
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20  # of /tmp, and of each file
    processes: int = 32  # threads count as processes
    open_files: int = 64  # of each process
    output_bytes: int = 64 << 10  # of stdout and of stderr, each
    result_bytes: int = 1 << 20  # of all results together, as they are encoded

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = (int, float) if field.name == "wall_s" else (int,)
            if type(value) not in numbers or not 0 < value < float("inf"):
                raise UserError(f"Limits.{field.name} is {value!r}; expected a number above 0, whole but for wall_s")


@cache
def python() -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The base interpreter of the virtual environment, the paths that it needs, and the folders of the packages
    installed in it, which are hidden."""
    base = os.path.realpath(sys.base_prefix)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = os.path.realpath(os.path.join(base, "bin", name))
    if not os.access(program, os.X_OK):
        raise UserError(f"the sandbox starts {program}, which is not there; run with a Python installed in bin and lib")
    folders = [os.path.join(base, folder) for folder in ("lib", "lib64")]
    libraries = [folder for folder in folders if os.path.isdir(folder)]
    packages = [f"{folder}/{name}/{kind}" for folder in libraries for kind in ("site-packages", "dist-packages")]
    packages += ["/usr/lib/python3/dist-packages"]
    return program, (program, *libraries), tuple(package for package in packages if os.path.isdir(package))


@cache
def _view() -> dict[str, Any]:
    """The host's paths that are visible inside, read-only (`binds`), those of them that are hidden (`masks`), and the
    symbolic links."""
    program, interpreter, packages = python()
    wanted = sorted({path for path in (*SYSTEM, *SYSTEM_FILES, *DEVICES, *interpreter) if os.path.exists(path)})
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    binds: list[str] = []
    for path in wanted:
        if path not in links and not any(path.startswith(above + "/") for above in binds):
            binds.append(path)
    links |= {"/sandbox/bin/python": program, "/sandbox/bin/python3": program}
    return {"binds": binds, "masks": [path for path in packages if not os.path.islink(path)], "links": links}


def make_plan(argv: list[str], job: str | None, limits: Limits) -> dict[str, Any]:
    """The plan for the launcher. Root becomes nobody, so that the code would own nothing even outside the sandbox."""
    user, group, inside = os.geteuid(), os.getegid(), launch.INSIDE_ID
    maps = [f"{inside} {user} 1", f"{inside} {group} 1"]
    if user == 0:
        maps = [f"0 0 1\n{inside} {NOBODY} 1"] * 2
    return {
        "argv": argv,
        "env": ENVIRONMENT,
        "job": job,
        "files": {},
        "limits": dataclasses.asdict(limits),
        "socket_bytes": _socket_bytes(),
        "filter": seccomp_filter().hex(),
        "uid_map": maps[0],
        "gid_map": maps[1],
        "drop_groups": user == 0,
        **_view(),
    }


@cache
def _socket_bytes() -> int:
    """The most bytes that can wait in one end of a socketpair: its buffer, plus half of it for the last message."""
    one, other = socket.socketpair()
    with one, other:
        return 3 * one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2


class Sandbox:
    """Runs one sandbox and holds its output. When the constructor returns, none of its processes is left."""

    def __init__(self, plan: dict[str, Any], limits: Limits) -> None:
        if sys.platform != "linux":
            raise UserError(f"the sandbox needs Linux's namespaces, and this is {sys.platform}: execute code on Linux")
        self.reason: Ended | None = None
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.cpu_s = 0.0
        self.received = {1: bytearray(), 2: bytearray(), "records": bytearray(), "status": bytearray()}
        self.room = {1: limits.output_bytes, 2: limits.output_bytes, "records": limits.result_bytes,
                     "status": MAX_STATUS}  # fmt: skip
        start = time.monotonic()
        status, status_end = os.pipe()
        records, records_end = os.pipe()
        package = Path(launch.__file__).parents[1]
        command = [python()[0], "-I", "-S", "-B", "-c", START, str(status_end), str(records_end), str(package)]
        with open(status, "rb", buffering=0) as status_file, open(records, "rb", buffering=0) as records_file:
            try:
                # A new program, not a fork, because threads of this process may hold any lock.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
                    pass_fds=(status_end, records_end), start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(status_end)
                os.close(records_end)
            with process:
                try:
                    self._talk(process, plan, status_file, records_file, start + limits.wall_s + GRACE_S)
                except BaseException:
                    process.kill()  # init gets a signal and dies, and with it everything inside
                    raise
        self.seconds = time.monotonic() - start
        self._read_status()

    def text(self, stream: Literal[1, 2]) -> str:
        return self.received[stream].decode(errors="replace")

    def _talk(self, process: subprocess.Popen[bytes], plan: dict[str, Any], status: IO[bytes], records: IO[bytes],
              deadline: float) -> None:  # fmt: skip
        """Sends the plan and reads all output to its end. Closing `stdin` makes the launcher end the sandbox."""
        assert process.stdin is not None  # all three are pipes, see Popen above
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write(json.dumps(plan).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the launcher has ended, and its status says why
        with selectors.DefaultSelector() as selector:
            for name, file in ((1, process.stdout), (2, process.stderr), ("records", records), ("status", status)):
                selector.register(file, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    part = os.read(key.fd, 65536)
                    if not part:
                        selector.unregister(key.fileobj)
                    elif not self._keep(key.data, part):
                        process.stdin.close()
                if time.monotonic() >= deadline:
                    self.reason = "wall"
                    process.kill()
                    return

    def _keep(self, name: Any, part: bytes) -> bool:
        """Stores what was read from a stream, up to its limit. Returns whether there is still room."""
        self.received[name] += part[: self.room[name] - len(self.received[name])]
        if len(self.received[name]) < self.room[name]:
            return True
        self.reason = self.reason or ("results" if name == "records" else "output")
        return False

    def _read_status(self) -> None:
        lines = [json.loads(line) for line in self.received["status"].splitlines()]
        said: dict[str, Any] = {name: value for line in lines for name, value in line.items()}
        if "refused" in said:
            raise UserError(_refusal(said["refused"]))
        if "killed" in said and self.reason is None:
            self.reason = said["killed"]
        if "status" in said:
            self.cpu_s = said["cpu_s"]
            code = os.waitstatus_to_exitcode(said["status"])
            self.exit_code, self.signal = (code, None) if code >= 0 else (None, -code)
        elif self.reason is None:
            raise UserError(_refusal(f"its launcher ended without a report; it printed: {self.text(2)[-2000:]!r}"))


def _refusal(why: str) -> str:
    return (
        f"code is not executed: the sandbox cannot isolate it here ({why}). It needs Linux 5.14 or newer with seccomp, "
        "and user namespaces that this user may create. As an ordinary user, look at the settings "
        "kernel.unprivileged_userns_clone (1), kernel.apparmor_restrict_unprivileged_userns (0) and "
        "user.max_user_namespaces (above 0); in a container, allow unshare and mount "
        "(Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN)"
    )
