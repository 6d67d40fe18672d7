"""Limits the memory that a run's processes hold together: counts it, and where possible uses a kernel control group.

Counting works everywhere. Where this user may create a memory control group (as root, or below a delegated cgroup), the
kernel also enforces the same limit exactly, however late the next count comes on a busy machine.

This module is part of the launcher and uses the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from pathlib import Path

# Memory is counted so often that it cannot exceed the limit by much in between, given how many pages all processors
# together can touch.
LOOK_S, LOOK_LEAST_S = 0.05, 0.001
BYTES_PER_S = 4 << 30  # that one processor can touch, with a margin for late counts
OWN_PAGES, ADDRESS_SPACE = (b"RssAnon:", b"VmSwap:", b"VmPTE:"), b"VmSize:"  # lines of /proc/PID/status
# The most that the kernel holds for a process in addition to its pages: per mapping, and per pipe.
MAPPING_BYTES = 512
PIPE_BYTES = 16 * resource.getpagesize()
SYS_KCMP, KCMP_VM = {"x86_64": 312, "aarch64": 272}, 1
GROUP = "smallcoder-sandbox-"  # followed by the pid of the process that created it
REMOVE_S = 2.0  # how long to wait until the killed processes have ended

libc = ctypes.CDLL(None, use_errno=True)


class Usage:
    """The memory that the processes of a run hold together at one moment.

    It counts private pages, in memory or swapped out (pages that are shared after a fork count for each process), page
    tables, mappings and `/tmp`. Pipes and sockets count as if they were full, each once, however many processes have it
    open.
    """

    def __init__(self, pid: int, socket_bytes: int) -> None:
        self.processes: list[int] = []
        self.pages = self.address_space = self.disk = 0
        self.buffers: dict[str, int] = {}  # bytes, by the name of the pipe or socket
        self.memories: list[str] = []  # one thread of each process that has its own memory
        self.costs = {"pipe": PIPE_BYTES, "socket": socket_bytes}
        self._add(pid, None)

    def _add(self, pid: int, parent: int | None) -> None:
        """Adds a process and all its descendants. Processes that end in the meantime are skipped."""
        self.processes.append(pid)
        lent = parent is not None and _same_memory(parent, pid)  # uses the parent's memory, as between vfork and exec
        threads = [f"/proc/{pid}/task/{name}" for name in _names(f"/proc/{pid}/task")]
        for thread in threads:
            sizes = _sizes(f"{thread}/status")
            if not sizes:
                continue  # a thread that has ended shows nothing of the memory that other threads still use
            if not lent or thread != f"/proc/{pid}/task/{pid}":
                self.memories.append(thread)
                self.pages += sum(sizes.get(name, 0) for name in OWN_PAGES)
                self.address_space += sizes.get(ADDRESS_SPACE, 0)
            if parent is not None:  # not for init, whose root is at first the host's
                with contextlib.suppress(OSError):
                    disk = os.statvfs(f"{thread}/root/tmp")
                    self.disk = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            break
        for thread in threads:
            for name in _names(f"{thread}/fd"):  # of every thread, because threads need not share descriptors
                with contextlib.suppress(OSError):
                    target = os.readlink(f"{thread}/fd/{name}")
                    if (cost := self.costs.get(target.partition(":")[0])) is not None:
                        self.buffers[target] = cost
            for child in _read(f"{thread}/children").split():
                self._add(int(child), pid)

    def bytes(self, limit: int) -> int:
        """The total. Counting mappings takes time; they are counted only where the most that the address space can hold
        would exceed `limit`."""
        counted = self.pages + self.disk + sum(self.buffers.values())
        at_most = counted + self.address_space // resource.getpagesize() * MAPPING_BYTES
        if at_most <= limit:
            return at_most
        for thread in self.memories:
            with contextlib.suppress(OSError), open(f"{thread}/maps", "rb", buffering=0) as file:
                while counted <= limit and (part := file.read(1 << 16)):
                    counted += part.count(b"\n") * MAPPING_BYTES
        return counted


def _same_memory(one: int, other: int) -> bool:
    """Whether the first threads of two processes share their memory; also True where both have ended."""
    number = ctypes.c_long(SYS_KCMP[os.uname().machine])
    return libc.syscall(number, one, other, KCMP_VM, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


def _sizes(path: str) -> dict[bytes, int]:
    """The sizes in `/proc/PID/status`, in bytes; empty for a thread that has ended."""
    lines = (line.split() for line in _read(path).split(b"\n") if line.startswith((*OWN_PAGES, ADDRESS_SPACE)))
    return {name: int(number) * 1024 for name, number, _ in lines}


def kill_at_once(usage: Usage, pid: int) -> None:
    """Kills all descendants of `pid`. The kernel does this too when init ends, but only when init is scheduled, and
    until then memory would grow.

    A pid that another process has reused since `usage` was taken is not killed: the descendants of `pid` are looked up
    once more after the descriptors were opened, and it is not among them.
    """
    descriptors: dict[int, int] = {}
    for process in usage.processes:
        with contextlib.suppress(OSError):
            descriptors[process] = os.pidfd_open(process)
    for process in Usage(pid, 0).processes:
        if process != pid and process in descriptors:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(descriptors[process], signal.SIGKILL)


class Group:
    """A memory control group for one run, version 1 or 2. Raises OSError if this user may not create it in `place`."""

    def __init__(self, place: Path, limit: int) -> None:
        for old in place.glob(f"{GROUP}*"):  # left by killed launchers; a group with processes cannot be removed
            if not Path(f"/proc/{old.name.removeprefix(GROUP)}").exists():
                with contextlib.suppress(OSError):
                    old.rmdir()
        self.folder = place / f"{GROUP}{os.getpid()}"
        self.folder.mkdir()
        try:
            if (self.folder / "memory.limit_in_bytes").exists():
                limits = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
                self._events = self.folder / "memory.oom_control"
            else:
                limits = {"memory.max": limit, "memory.swap.max": 0}
                self._events = self.folder / "memory.events"
            for name, number in limits.items():
                if "sw" not in name or (self.folder / name).exists():  # swap is not counted everywhere
                    (self.folder / name).write_text(str(number))
            # Opened before the namespaces are entered, because the kernel checks the rights of the opening process.
            self._processes = os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            raise

    def join(self) -> None:
        """Moves this process into the group, where its children start too. Raises OSError."""
        os.write(self._processes, b"0")

    def killed(self) -> bool:
        """Whether the kernel killed a process of the group because of its memory limit."""
        return any(name == b"oom_kill" and number != b"0" for name, number in _pairs(_read(str(self._events))))

    def remove(self) -> None:
        """Removes the group. All its processes must have been killed."""
        os.close(self._processes)
        until = time.monotonic() + REMOVE_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                return self.folder.rmdir()
            time.sleep(0.001)


def make_group(limit: int) -> Group | None:
    """A group with a limit of `limit` bytes; None where this user may create one nowhere."""
    for place in group_places(_read("/proc/self/cgroup").decode(), _read("/proc/self/mountinfo").decode()):
        with contextlib.suppress(OSError):
            return Group(place, limit)
    return None


def group_places(cgroup: str, mountinfo: str) -> list[Path]:
    """The folders in which a memory control group can be created, from the texts of these files in `/proc/self`.

    In version 1 this is the group of this process. In version 2 a group with processes cannot delegate memory. There it
    is the group above, or this process's own group where that delegates memory nevertheless, as the root does.
    """
    groups = [line.split(":", 2) for line in cgroup.splitlines()]
    places = []
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        root, point = mount.split()[3:5]
        system, _, options = kind.split(" ", 2)
        version_1 = system == "cgroup" and "memory" in options.split(",")
        if not version_1 and system != "cgroup2":
            continue
        for _, controllers, path in groups:
            if controllers.split(",").count("memory") if version_1 else not controllers:
                below = os.path.relpath(path, root)
                if below.split("/")[0] == "..":
                    continue  # not visible from this process
                own = Path(point) / below
                places += [own] if version_1 else [p for p in (own, own.parent) if _delegates_memory(p, Path(point))]
    return places


def _delegates_memory(place: Path, top: Path) -> bool:
    return place.is_relative_to(top) and b"memory" in _read(str(place / "cgroup.subtree_control")).split()


def _pairs(text: bytes) -> list[tuple[bytes, bytes]]:
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=False))
