"""The memory that a run's processes hold together: counted in one look, and kept within a control group of the kernel.

Counting works everywhere and decides. Where this user may make a memory control group (as root, or below a cgroup that
was delegated), the kernel keeps the same limit to the page, however late a look comes on a busy machine.

Part of the launcher: the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from pathlib import Path

# Memory is looked at often enough that it cannot pass the limit by much in between: by what every processor could
# touch, page by page.
LOOK_S, LOOK_LEAST_S = 0.05, 0.001
BYTES_PER_S = 4 << 30  # of one processor, and some time to be late
OWN_PAGES, ADDRESS_SPACE = (b"RssAnon:", b"VmSwap:", b"VmPTE:"), b"VmSize:"  # of /proc/PID/status
# What the kernel holds for a process beside its pages, at most.
MAPPING_BYTES = 512
PIPE_BYTES = 16 * resource.getpagesize()
SYS_KCMP, KCMP_VM = {"x86_64": 312, "aarch64": 272}, 1
GROUP = "smallcoder-sandbox-"  # and the number of the process that made it
REMOVE_S = 2.0  # in which what was killed has ended

libc = ctypes.CDLL(None, use_errno=True)


class Usage:
    """What the processes of a run hold together, in one look.

    Pages of their own, in memory or swapped out, where pages shared after a fork count for each; tables of pages;
    mappings; `/tmp`; pipes and sockets as if they were full, each once however many processes have it open.
    """

    def __init__(self, pid: int, socket_bytes: int) -> None:
        self.processes: list[int] = []
        self.pages = self.address_space = self.disk = 0
        self.buffers: dict[str, int] = {}  # by the name of the pipe or socket
        self.memories: list[str] = []  # a thread of each process with memory of its own
        self.costs = {"pipe": PIPE_BYTES, "socket": socket_bytes}
        self._add(pid, None)

    def _add(self, pid: int, parent: int | None) -> None:
        """Adds a process and all below it. What ends meanwhile is left out."""
        self.processes.append(pid)
        lent = parent is not None and _same_memory(parent, pid)  # as between vfork and exec
        threads = [f"/proc/{pid}/task/{name}" for name in _names(f"/proc/{pid}/task")]
        for thread in threads:
            sizes = _sizes(f"{thread}/status")
            if not sizes:
                continue  # it has ended, and shows nothing of the memory that others use still
            if not lent or thread != f"/proc/{pid}/task/{pid}":
                self.memories.append(thread)
                self.pages += sum(sizes.get(name, 0) for name in OWN_PAGES)
                self.address_space += sizes.get(ADDRESS_SPACE, 0)
            if parent is not None:  # init begins with the host's files
                with contextlib.suppress(OSError):
                    disk = os.statvfs(f"{thread}/root/tmp")
                    self.disk = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            break
        for thread in threads:
            for name in _names(f"{thread}/fd"):  # threads need not share descriptors
                with contextlib.suppress(OSError):
                    target = os.readlink(f"{thread}/fd/{name}")
                    if (cost := self.costs.get(target.partition(":")[0])) is not None:
                        self.buffers[target] = cost
            for child in _read(f"{thread}/children").split():
                self._add(int(child), pid)

    def bytes(self, limit: int) -> int:
        """All of it. Mappings are counted, which takes time, where as many as there is room for would pass `limit`."""
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
    """Whether the first threads of two processes use one memory; also where both have ended."""
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
    """What `/proc/PID/status` says of memory, in bytes; nothing of a thread that has ended."""
    lines = (line.split() for line in _read(path).split(b"\n") if line.startswith((*OWN_PAGES, ADDRESS_SPACE)))
    return {name: int(number) * 1024 for name, number, _ in lines}


def kill_at_once(usage: Usage, pid: int) -> None:
    """Kills everything below `pid`. The kernel does so too when init ends, but not before init's turn has come.

    Meanwhile memory would grow. A number that has passed to another process since `usage` was taken is left alone: it
    is not below `pid` when looked up once more, after the descriptors were opened.
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
    """A memory control group for one run, version 1 or 2. Raises OSError where this user may not make it in `place`."""

    def __init__(self, place: Path, limit: int) -> None:
        for old in place.glob(f"{GROUP}*"):  # of a launcher that was killed; it cannot be removed while it holds any
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
            # Opened before the namespaces: the kernel asks for the rights of whoever opened it.
            self._processes = os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            raise

    def join(self) -> None:
        """Moves this process into the group; its children are born there. Raises OSError."""
        os.write(self._processes, b"0")

    def killed(self) -> bool:
        """Whether the kernel killed a process of the group for want of memory."""
        return any(name == b"oom_kill" and number != b"0" for name, number in _pairs(_read(str(self._events))))

    def remove(self) -> None:
        """Removes the group, in which everything has been killed."""
        os.close(self._processes)
        until = time.monotonic() + REMOVE_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                return self.folder.rmdir()
            time.sleep(0.001)


def make_group(limit: int) -> Group | None:
    """A group of `limit` bytes; None where there is no place for it that this user may use."""
    for place in group_places(_read("/proc/self/cgroup").decode(), _read("/proc/self/mountinfo").decode()):
        with contextlib.suppress(OSError):
            return Group(place, limit)
    return None


def group_places(cgroup: str, mountinfo: str) -> list[Path]:
    """The folders in which a memory control group can be made, by the texts of these files in `/proc/self`.

    Version 1: the group of this process. Version 2, where a group with processes cannot hand memory on: the group above
    it, or its own where memory is handed on all the same, as in the root.
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
                    continue  # not to be seen from here
                own = Path(point) / below
                places += [own] if version_1 else [p for p in (own, own.parent) if _hands_on_memory(p, Path(point))]
    return places


def _hands_on_memory(place: Path, top: Path) -> bool:
    return place.is_relative_to(top) and b"memory" in _read(str(place / "cgroup.subtree_control")).split()


def _pairs(text: bytes) -> list[tuple[bytes, bytes]]:
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=False))
