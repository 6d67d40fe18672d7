"""Builds the sandbox around one program (namespaces, mounts, limits), waits for it and removes everything again.

`process.py` starts this module as a separate program, because a process with JAX's threads must not fork. This module
and `memory.py` use the standard library only. Three processes start one another:

    helper   is in the namespaces of users, network, pids, ipc and host name, but outside the mount namespace. It
             watches the clock, the memory and `stdin`. It kills init at a limit, or when `stdin` ends because the
             caller is gone.
    init     is pid 1 of the sandbox. It mounts, drops every privilege, starts the program and reaps processes. When it
             ends, the kernel kills everything that is left in the pid namespace, however it was forked.
    program  sets its limits and calls `exec`, so that nothing of this file is left in its memory.

The plan arrives as one line of JSON on `stdin`. What happens is reported to the descriptor in `argv[1]`, one JSON
object per line. The program never has this descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from smallcoder_jax.sandbox.memory import (
    BYTES_PER_S,
    LOOK_LEAST_S,
    LOOK_S,
    Group,
    Usage,
    kill_at_once,
    libc,
    make_group,
)  # fmt: skip

CLONE = {"NEWNS": 0x20000, "NEWCGROUP": 0x2000000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000,
         "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000}  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 1, 2, 4, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_SET_THP_DISABLE = 41
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR, SYS_PIVOT_ROOT, SYS_CAPSET = 442, {"x86_64": 155, "aarch64": 41}, {"x86_64": 126, "aarch64": 91}
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
INSIDE_ID = 1000  # user and group of the program, as it sees them
PENDING = 512  # pending signals and timers
MAX_FILES = 4096  # in the sandbox's /tmp
# Mapping /dev/zero as shared gives memory that nothing counts. /dev/full also reads as zeros, and cannot be mapped.
DEVICE_SOURCES = {"/dev/zero": "/dev/full"}

Report = Callable[..., None]


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def check(step: str, result: int) -> None:
    """Raises OSError that names the `step` where a call of libc failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), step)


def unshare(*names: str) -> None:
    check(f"unshare {' '.join(names)}", libc.unshare(sum(CLONE[name] for name in names)))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [item.encode() if item is not None else None for item in (source, target, kind)]
    check(f"mount {source} on {target}", libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()))


def read_only(path: str, *, recursive: bool, attributes: int = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID) -> None:
    new = MountAttr(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (ctypes.c_long(SYS_MOUNT_SETATTR), -100, path.encode(), flags, ctypes.byref(new), ctypes.sizeof(new))
    check(f"mount_setattr {path} (Linux 5.12 or newer)", libc.syscall(*arguments))


def map_ids(helper: int, plan: dict[str, Any]) -> None:
    """Writes the maps of the helper's user namespace, from outside it, where root may map another user too."""
    if not plan["drop_groups"]:
        _write(f"/proc/{helper}/setgroups", "deny")
    _write(f"/proc/{helper}/uid_map", plan["uid_map"])
    _write(f"/proc/{helper}/gid_map", plan["gid_map"])


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_namespaces(plan: dict[str, Any], report: Report) -> None:
    """Moves this process into new namespaces with the maps of `plan`; into the pid namespace only its children."""
    helper = os.getpid()
    ready, go = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(go)
        try:
            if os.read(ready, 1):
                map_ids(helper, plan)
        except OSError as error:
            report(refused=f"the map of users: {error}")
            os._exit(1)
        os._exit(0)
    unshare("NEWUSER", "NEWPID", "NEWNET", "NEWIPC", "NEWUTS", "NEWCGROUP")
    os.write(go, b"1")
    os.close(go)
    os.close(ready)
    if os.waitpid(mapper, 0)[1] != 0:
        os._exit(1)


def build_root(plan: dict[str, Any]) -> None:
    """Builds a separate file system: the paths that the plan binds, read-only, and a /tmp of limited size. Nothing else
    of the host is visible."""
    unshare("NEWNS")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1000,mode=755")
    os.mkdir("/tmp/host")
    number = ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine])
    check("pivot_root", libc.syscall(number, b"/tmp", b"/tmp/host"))
    os.chdir("/")
    os.mkdir("/tmp")
    size = f"size={plan['limits']['disk_bytes']},nr_inodes={MAX_FILES},mode=777"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in plan["binds"]:
        _bind(path)
    for path in plan["masks"]:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=4k,mode=755")
    for path, target in plan["links"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    check("umount the host's files", libc.umount2(b"/host", MNT_DETACH))
    os.rmdir("/host")
    read_only("/", recursive=False)
    os.chdir("/tmp")


def _bind(path: str) -> None:
    source = "/host" + DEVICE_SOURCES.get(path, path)
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, path, None, MS_BIND | MS_REC)
    device = path.startswith("/dev/")
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if device else MOUNT_ATTR_NODEV)
    read_only(path, recursive=True, attributes=attributes)


def give_up_privileges(plan: dict[str, Any]) -> None:
    """Drops the host's user and every capability, permanently, with no way to regain one."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # after the last capability that this kernel knows
    if plan["drop_groups"]:
        os.setgroups([])
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check("capset", libc.syscall(ctypes.c_long(SYS_CAPSET[os.uname().machine]), header, nothing))
    check("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # The program has the same user as init and must not inspect it. Changing users cleared the signal that is sent on
    # the parent's death, so it is set here.
    check("dumpable", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    check("death signal", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def write_files(files: dict[str, str]) -> None:
    for name, text in files.items():
        os.makedirs(os.path.dirname(os.path.join("/tmp", name)), exist_ok=True)
        with open(os.path.join("/tmp", name), "wb") as file:
            file.write(bytes.fromhex(text))


def set_limits(limits: dict[str, Any]) -> None:
    """Sets the limits of each process. The limits of all together are enforced elsewhere: time and memory by the
    helper, files by the size of /tmp."""
    cpu = limits["cpu_s"]
    pairs = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, which identifies this limit; one second later SIGKILL
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["disk_bytes"],) * 2,
        resource.RLIMIT_NPROC: (limits["processes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_STACK: (8 << 20,) * 2,
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_SIGPENDING: (PENDING,) * 2,  # timers too
        resource.RLIMIT_RTPRIO: (0, 0),
        resource.RLIMIT_NICE: (0, 0),
        resource.RLIMIT_CORE: (1, 1),  # not 0, at which the kernel would still pipe a core to a handler
    }
    for which, (soft, hard) in pairs.items():
        resource.setrlimit(which, (soft, hard))


def install_filter(text: bytes) -> None:
    buffer = ctypes.create_string_buffer(text, len(text))
    program = FilterProgram(len(text) // 8, ctypes.addressof(buffer))
    check("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def run_program(plan: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Becomes the program by `exec`, with `descriptors` as 0, 1, 2, ... and no others."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64) for descriptor in descriptors]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, number)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program expects the defaults
        signal.signal(ignored, signal.SIG_DFL)
    # Memory is touched one page at a time, so that it cannot grow faster than the helper checks it.
    check("transparent huge pages", libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
    set_limits(plan["limits"])
    install_filter(bytes.fromhex(plan["filter"]))
    os.execve(plan["argv"][0], plan["argv"], plan["env"])


def init(plan: dict[str, Any], alive: int, records: int, group: Group | None, report: Report) -> NoReturn:
    """Pid 1: builds the sandbox, starts the program, reaps processes. `alive` is a pipe that ends with the helper."""
    if group is not None:
        with contextlib.suppress(OSError):  # version 2 may forbid joining; the helper's counting still keeps the limit
            group.join()
    os.setsid()
    check("sethostname", libc.sethostname(b"sandbox", 7))
    descriptors = [-1, 1, 2]
    if plan["job"] is not None:
        descriptors += [os.memfd_create("job"), records]
        with open(descriptors[3], "wb", closefd=False) as file:
            file.write(plan["job"].encode())
        os.lseek(descriptors[3], 0, os.SEEK_SET)
    build_root(plan)
    descriptors[0] = os.open("/dev/null", os.O_RDONLY)
    give_up_privileges(plan)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the helper died before the signal on its death was set
    write_files(plan["files"])
    program = os.fork()
    if program == 0:
        run_program(plan, descriptors)
    for descriptor in {0, 1, 2, *descriptors}:
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            report(status=status, cpu_s=usage.ru_utime + usage.ru_stime)
            os._exit(0)


def watch(pid: int, plan: dict[str, Any], group: Group | None, report: Report) -> None:
    """Waits for init, with which everything ends. Kills it at a limit, or when the caller is gone."""
    limits = plan["limits"]
    deadline = time.monotonic() + limits["wall_s"]
    ended = os.pidfd_open(pid)
    events = select.poll()
    events.register(ended, select.POLLIN)
    events.register(0, select.POLLIN)
    rate = BYTES_PER_S * min(os.cpu_count() or 1, limits["processes"])
    reason, used = None, 0
    while reason is None:
        left = deadline - time.monotonic()
        pause = min(LOOK_S, left, max(LOOK_LEAST_S, (limits["memory_bytes"] - used) / rate))
        ready = [descriptor for descriptor, _ in events.poll(1000 * max(0.0, pause))]
        if ended in ready:
            break
        if 0 in ready:
            reason = "abandoned"
        elif left <= 0:
            reason = "wall"
        else:
            usage = Usage(pid, plan["socket_bytes"])
            used = usage.bytes(limits["memory_bytes"])
            if used > limits["memory_bytes"] or (group is not None and group.killed()):
                reason = "memory"
                kill_at_once(usage, pid)
    if reason is not None:
        report(killed=reason)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if reason is None and group is not None and group.killed():
        report(killed="memory")


def main() -> None:
    """Runs one plan. Every error before the program starts is reported as `refused`."""
    status, records = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (status, records):
        os.set_inheritable(descriptor, False)

    def report(**what: Any) -> None:
        os.write(status, json.dumps(what).encode() + b"\n")

    try:
        plan = b""
        while not plan.endswith(b"\n"):
            part = os.read(0, 1 << 20)
            if not part:
                return  # the caller is gone
            plan += part
        run(json.loads(plan), records, report)
    # An error of helper, init or program ends that process: none of them may continue half isolated.
    except OSError as error:
        report(refused=f"{error.filename}: {error.strerror}" if error.filename is not None else repr(error))
    except Exception as error:
        report(refused=repr(error))
    finally:
        os._exit(0)


def run(plan: dict[str, Any], records: int, report: Report) -> None:
    """The helper's part: creates the control group, enters the namespaces, starts init and watches it."""
    _write("/proc/self/oom_score_adj", "1000")  # if the machine runs out of memory, this is killed first
    os.stat(f"/proc/self/task/{os.getpid()}/children")  # fails where the memory below could not be counted
    group, helper = make_group(plan["limits"]["memory_bytes"]), os.getpid()
    try:
        enter_namespaces(plan, report)
        alive, held = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(held)
            init(plan, alive, records, group, report)
        for descriptor in (1, 2, records):
            os.close(descriptor)  # so that their readers see the end when the sandbox ends
        watch(pid, plan, group, report)
    finally:
        if group is not None and os.getpid() == helper:  # init gets here too, by an error
            group.remove()
