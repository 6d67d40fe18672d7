"""The system calls that code in the sandbox may not make, as a seccomp program (classic BPF) for this machine.

The namespaces already take files, network and other processes away. What is left is the kernel itself: the calls
below reach parts of it where errors that lead out of a container have been found, or that no program to be scored
needs. They fail with EPERM instead of ending the program, so that the program can say so.
"""

from __future__ import annotations

import errno
import platform
import struct

from smallcoder_jax.base.errors import UserError

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
NEWEST = 450  # calls numbered above (newer ones, and those of x32): ENOSYS, which libraries know how to do without

# name: (x86_64, aarch64); None where the architecture has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # network: socketpair stays, which asyncio needs
    "socket": (41, 198),
    # memory that no limit of a process counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "setrlimit": (160, 164),
    # parts of the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "acct": (163, 89),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
CLONE, CLONE3, IOCTL, PRLIMIT = (56, 220), (435, 435), (16, 29), (302, 261)
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of linux/sched.h that clone takes
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # type into the terminal of whoever started the program

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def seccomp_filter() -> bytes:
    """The filter for this machine as an array of `struct sock_filter`. UserError on another architecture."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise UserError(
            f"the sandbox has no system call filter for {machine}; it runs on {' and '.join(ARCHITECTURES)}: "
            "execute code on such a machine"
        )
    column = list(ARCHITECTURES).index(machine)
    denied, missing = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    # (code, argument, instructions to skip if it holds, if it does not)
    program = [(_LOAD, _ARCHITECTURE, 0, 0), (_EQUAL, ARCHITECTURES[machine], 1, 0), (_RETURN, _KILL, 0, 0)]
    program += [(_LOAD, _NUMBER, 0, 0), (_GREATER, NEWEST, 0, 1), (_RETURN, missing, 0, 0)]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, number, 0, 1), (_RETURN, denied, 0, 0)]
    # clone3 hides its flags behind a pointer; libraries then take clone, whose flags can be looked at.
    program += [(_EQUAL, CLONE3[column], 0, 1), (_RETURN, missing, 0, 0)]
    program += [(_EQUAL, CLONE[column], 0, 4), (_LOAD, _ARGUMENTS, 0, 0), (_ANY_BIT, NEW_NAMESPACES, 0, 1)]
    program += [(_RETURN, denied, 0, 0), (_RETURN, _ALLOW, 0, 0)]
    program += [(_EQUAL, IOCTL[column], 0, 5), (_LOAD, _ARGUMENTS + 8, 0, 0), (_EQUAL, TIOCSTI, 1, 0)]
    program += [(_EQUAL, TIOCLINUX, 0, 1), (_RETURN, denied, 0, 0), (_RETURN, _ALLOW, 0, 0)]
    # prlimit may read limits (no new ones in the third argument), its own only by the kernel's rules.
    program += [(_EQUAL, PRLIMIT[column], 0, 5), (_LOAD, _ARGUMENTS + 16, 0, 0), (_EQUAL, 0, 0, 2)]
    program += [(_LOAD, _ARGUMENTS + 20, 0, 0), (_EQUAL, 0, 1, 0), (_RETURN, denied, 0, 0)]
    program += [(_RETURN, _ALLOW, 0, 0)]
    return b"".join(struct.pack("=HBBI", code, yes, no, value) for code, value, yes, no in program)
