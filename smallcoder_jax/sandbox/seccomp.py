"""The system calls that code in the sandbox may make, as a seccomp program (classic BPF) for this machine.

The namespaces already hide files, network and other processes. What remains is the kernel itself, and state in it that
belongs to no namespace or is counted nowhere. Therefore only the listed calls are allowed. All others fail with EPERM
instead of ending the program, so that the program can report it. `docs/sandbox.md` discusses the calls that are not
listed, and the listed ones whose effects extend beyond the process.
"""

from __future__ import annotations

import errno
import platform
import struct

from smallcoder_jax.base.errors import UserError

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
NEWEST = 450  # higher numbers (newer calls, and those of x32) give ENOSYS, for which libraries have a fallback

Numbers = tuple[int | None, int | None]  # x86_64, aarch64; None where the architecture has no such call

ALLOWED: dict[str, Numbers] = {
    # files
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "openat": (257, 56), "openat2": (437, 437),
    "creat": (85, None), "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71), "copy_file_range": (326, 285), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None),
    "symlinkat": (266, 36), "readlink": (89, None), "readlinkat": (267, 78), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "umask": (95, 166), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    # the ends of a socketpair, without addresses and without descriptors in messages
    "recvfrom": (45, 207), "recvmsg": (47, 212), "recvmmsg": (299, 243), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19), "signalfd": (282, None),
    "signalfd4": (289, 74), "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    # memory of the process
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "msync": (26, 227),
    "pkey_mprotect": (329, 288), "pkey_alloc": (330, 289), "pkey_free": (331, 290), "membarrier": (324, 283),
    "get_mempolicy": (239, 236),
    # processes and threads, which the pid namespace holds in
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "exit": (60, 93),
    "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "set_tid_address": (218, 96), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "futex": (202, 98), "futex_waitv": (449, 449), "rseq": (334, 293), "arch_prctl": (158, None),
    "restart_syscall": (219, 128), "setpgid": (109, 154), "getpgid": (121, 155), "getpgrp": (111, None),
    "setsid": (112, 157), "getsid": (124, 156), "pidfd_open": (434, 434), "sched_yield": (24, 124),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_getattr": (315, 275),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "sched_rr_get_interval": (148, 127),
    "sched_setaffinity": (203, 122), "sched_getaffinity": (204, 123), "getpriority": (140, 141),
    "setpriority": (141, 140), "ioprio_get": (252, 31), "getcpu": (309, 168),
    # signals
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    # users and limits
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "setuid": (105, 146), "setgid": (106, 144),
    "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149),
    "setfsuid": (122, 151), "setfsgid": (123, 152), "setgroups": (116, 159), "capget": (125, 90),
    "getrlimit": (97, 163), "getrusage": (98, 165),
    # time, and what the machine is
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getitimer": (36, 102), "setitimer": (38, 103),
    "alarm": (37, None), "timer_create": (222, 107), "timer_settime": (223, 110), "timer_gettime": (224, 108),
    "timer_getoverrun": (225, 109), "timer_delete": (226, 111), "getrandom": (318, 278), "uname": (63, 160),
    "sysinfo": (99, 179),
}  # fmt: skip

# name: (numbers, which argument (an int), its values that are allowed)
CHECKED: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # Descriptors and their flags, F_GETLK, sizes of pipes and seals. No lease, no watch, no larger pipe, no owner.
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 1030, 1032, 1034)),
    # TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2: nothing is typed into a terminal
    "ioctl": ((16, 29), 1, (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)),
    # Signal at the parent's death, name, timer slack, subreaper, no_new_privs, and reading others; vector length,
    # speculation and pointer keys of the thread. No filters, names of mappings, core scheduling, merged pages; nor
    # PR_SET_DUMPABLE, which hides descriptors from whoever counts them.
    "prctl": ((157, 167), 0, (1, 2, 3, 15, 16, 21, 23, 27, 29, 30, 36, 37, 38, 39, 40, 42, 50, 51, 52, 53, 54, 55, 56,
                              63, 64)),
    # Not COLD and PAGEOUT (pages of others' files), MERGEABLE (shared with others' memory), HWPOISON.
    "madvise": ((28, 233), 2, (0, 1, 2, 3, 4, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23)),
    "fadvise64": ((221, 223), 3, (0, 1, 2, 3, 5)),  # not DONTNEED, which drops the host's cache
    "socketpair": ((53, 199), 0, (1,)),  # AF_UNIX, which asyncio needs; no other socket
    "sendto": ((44, 206), 5, (0,)),  # send: the address has no length
}  # fmt: skip

MMAP, CLONE, CLONE3, PRLIMIT, FCNTL = (9, 222), (56, 220), (435, 435), (302, 261), CHECKED["fcntl"][0]
MAP_SHARED, MAP_ANONYMOUS = 1, 0x20
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of linux/sched.h that clone takes
F_SETLK = 6

_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_DENY, _MISSING, _PRETEND = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS, _ERRNO | 0

Instruction = tuple[int, int, int, int]  # code, argument, instructions to skip if the test holds, and if it does not


def seccomp_filter() -> bytes:
    """The filter for this machine as an array of `struct sock_filter`. Raises UserError on another architecture."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise UserError(
            f"the sandbox has no system call filter for {machine}; it runs on {' and '.join(ARCHITECTURES)}: "
            "execute code on such a machine"
        )
    column = list(ARCHITECTURES).index(machine)
    program: list[Instruction] = [
        (_LOAD, _ARCHITECTURE, 0, 0), (_EQUAL, ARCHITECTURES[machine], 1, 0), (_RETURN, _KILL, 0, 0),
        (_LOAD, _NUMBER, 0, 0), (_GREATER, NEWEST, 0, 1), (_RETURN, _MISSING, 0, 0),
    ]  # fmt: skip
    for low, high in _ranges([numbers[column] for numbers in ALLOWED.values()]):
        program += [(_AT_LEAST, low, 0, 2), (_GREATER, high, 1, 0), (_RETURN, _ALLOW, 0, 0)]
    # clone3 passes its flags behind a pointer. Without it, libraries use clone, whose flags the filter can check.
    program += _call(CLONE3[column], [(_RETURN, _MISSING, 0, 0)])
    program += _call(CLONE[column], [(_LOAD, _argument(0), 0, 0), (_ANY_BIT, NEW_NAMESPACES, 1, 0),
                                     (_RETURN, _ALLOW, 0, 0), (_RETURN, _DENY, 0, 0)])  # fmt: skip
    # Shared anonymous memory persists while any page of it is mapped, and nothing reports how much it is.
    program += _call(MMAP[column], [(_LOAD, _argument(3), 0, 0), (_ANY_BIT, MAP_ANONYMOUS, 0, 1),
                                    (_ANY_BIT, MAP_SHARED, 1, 0), (_RETURN, _ALLOW, 0, 0),
                                    (_RETURN, _DENY, 0, 0)])  # fmt: skip
    # prlimit may only read limits: the third argument, the new limits, must be null. The kernel restricts whose.
    program += _call(PRLIMIT[column], [(_LOAD, _argument(2), 0, 0), (_EQUAL, 0, 0, 2), (_LOAD, _argument(2) + 4, 0, 0),
                                       (_EQUAL, 0, 1, 0), (_RETURN, _DENY, 0, 0), (_RETURN, _ALLOW, 0, 0)])  # fmt: skip
    # A lock of a range would lock the host's file, and a program could take millions of them. Databases request locks
    # without waiting (F_SETLK) and do not work where that fails, so that the call reports success without locking.
    # Requests that wait for a lock (F_SETLKW) are denied.
    program += _call(FCNTL[column], [(_LOAD, _argument(1), 0, 0), (_EQUAL, F_SETLK, 0, 1),
                                     (_RETURN, _PRETEND, 0, 0), (_LOAD, _NUMBER, 0, 0)])  # fmt: skip
    for numbers, index, values in CHECKED.values():
        tests = [(_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
        program += _call(numbers[column], [(_LOAD, _argument(index), 0, 0), *tests, (_RETURN, _DENY, 0, 0),
                                           (_RETURN, _ALLOW, 0, 0)])  # fmt: skip
    program += [(_RETURN, _DENY, 0, 0)]
    return b"".join(struct.pack("=HBBI", code, yes, no, value) for code, value, yes, no in program)


def _call(number: int | None, body: list[Instruction]) -> list[Instruction]:
    """The instructions for one system call; `body` has to return, or to load the call's number again at its end."""
    return [] if number is None else [(_EQUAL, number, 0, len(body)), *body]


def _argument(index: int) -> int:
    """The offset of the lower half of an argument, which comes first on both architectures."""
    return _ARGUMENTS + 8 * index


def _ranges(numbers: list[int | None]) -> list[tuple[int, int]]:
    """The numbers, combined into contiguous ranges (first, last)."""
    found: list[tuple[int, int]] = []
    for number in sorted(number for number in numbers if number is not None):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
