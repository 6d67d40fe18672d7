"""Attacks on the sandbox, each of which has to fail in the way that is stated; and right answers, which have to pass.

Where the system call filter alone would stop an attack, it is made once more without the filter.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.sandbox import memory, process, worker
from smallcoder_jax.sandbox import run as sandbox
from smallcoder_jax.sandbox.run import Call, Limits, run_command, run_doctests, run_python, run_tests, same_value

ROOT = Path(__file__).resolve().parents[2]
ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
QUICK = Limits(wall_s=5, cpu_s=5)
# Each attack of the two tables below calls f(41) and must not be scored as if it had returned 42.
RIGHT = 42

FIND_NONCE = """
import os, sys
frame = sys._getframe()
while frame is not None and "job" not in frame.f_locals:
    frame = frame.f_back
nonce = frame.f_locals["job"]["nonce"]
def forge(text):
    os.write(4, f"\\n{nonce} {text}\\n".encode())
"""
LEAVE = "\nos._exit(0)"  # before the harness writes: only the forged record can be what voids the run

# Processes, each of which does `body` and stays. Little of what they take is memory of their own.
SEVERAL = """
import ctypes, mmap, os, socket, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []
def keep(thing):
    kept.append(thing)
    time.sleep(9)
def fill(*ends):
    ends = [end if type(end) is int else end.detach() for end in ends]
    for end in ends:
        os.set_blocking(end, False)
        try:
            while True: os.write(end, b"x" * 65536)
        except OSError: pass
    return ends
BODY = {body!r}
for number in range({count}):
    if os.fork() == 0:
        exec(BODY)
        time.sleep(9)
time.sleep(9)
"""
MAP_OFTEN = """
start = libc.mmap(None, 30000 << 12, 1, 0x22, -1, 0)
for page in range(0, 30000, 2): libc.mprotect(start + (page << 12), 4096, 0)
"""
# The first thread ends, and another goes on.
LEAVE_TO = """
threading.Thread(target={}).start()
libc.syscall({{"x86_64": 60, "aarch64": 93}}[os.uname().machine], 0)
"""
# name, code, how the run ends, what the error of the call says; limits where they matter.
SCORED: list[tuple[str, str, str, str] | tuple[str, str, str, str, Limits]] = [
    # leaving early: an exit code is no answer
    ("sys_exit", "import sys; sys.exit(0)", "finished", "not run: SystemExit: 0"),
    ("sys_exit_in_call", "import sys\ndef f(x): sys.exit(0)", "finished", "SystemExit: 0"),
    ("os_exit", "import os; os._exit(0)", "exited", "not run: exited"),
    ("os_exit_in_call", "import os\ndef f(x): os._exit(0)", "exited", "not run: exited"),
    ("exception_at_import", "raise ValueError('no')", "finished", "not run: ValueError: no"),
    ("interrupt", "def f(x): raise KeyboardInterrupt", "finished", "KeyboardInterrupt"),
    ("generator_exit", "def f(x): raise GeneratorExit", "finished", "GeneratorExit"),
    ("syntax_error", "def f(x) return 42", "finished", "SyntaxError"),
    ("no_such_function", "pass", "finished", "AttributeError"),
    ("atexit", "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): return 0", "finished", "value 0"),
    ("exec_another_program", "import os; os.execv('/usr/bin/true', ['true'])", "exited", "not run"),
    ("exception_without_text", "class E(Exception):\n def __str__(self): raise E\ndef f(x): raise E", "finished",
     "an exception that cannot be printed"),
    # never ending
    ("endless_loop", "while True: pass", "cpu", "not run: cpu", Limits(cpu_s=1, wall_s=40)),
    ("ignores_the_cpu_signal", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "cpu",
     "not run: cpu", Limits(cpu_s=1, wall_s=40)),
    ("sleep", "import time; time.sleep(99)", "wall", "not run: wall", Limits(wall_s=0.5)),
    ("ignores_all_signals", "import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, 1)\n"
     "time.sleep(99)", "wall", "not run: wall", Limits(wall_s=0.5)),
    ("stops_itself", "import os; os.kill(os.getpid(), 19)", "wall", "not run: wall", Limits(wall_s=0.5)),
    ("thread_that_stays", "import threading, time\n"
     "def f(x):\n threading.Thread(target=time.sleep, args=(99,)).start()\n return 0", "finished", "value 0"),
    # taking everything
    ("fork_bomb", "import os\nwhile True:\n try: os.fork()\n except OSError: pass", "wall", "not run: wall",
     Limits(wall_s=0.7)),
    ("thread_bomb", "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
     "finished", "not run: RuntimeError: can't start new thread"),
    ("one_large_object", "def f(x): return bytearray(10 ** 12)", "finished", "MemoryError"),
    ("memory_bit_by_bit", "a = []\nwhile True: a.append(bytearray(1 << 20))", "finished", "MemoryError",
     Limits(memory_bytes=256 << 20)),
    ("memory_of_many_processes", "import os, time\nfor _ in range(3): os.fork()\nb = bytearray(b'x' * (60 << 20))\n"
     "time.sleep(9)", "memory", "not run: memory", Limits(memory_bytes=256 << 20, processes=16)),
    # memory that is no page of a process, or of one that does not show it
    ("shared_memory", "import mmap\ndef f(x): return mmap.mmap(-1, 1 << 20)", "finished", "PermissionError"),
    ("shared_zeros", "import mmap\ndef f(x): return mmap.mmap(__import__('os').open('/dev/zero', 2), 1 << 20)",
     "finished", "OSError: [Errno 19]"),
    ("shared_zeros_read_only", "import mmap, os\ndef f(x):\n"
     " return mmap.mmap(os.open('/dev/zero', 0), 1 << 20, mmap.MAP_SHARED, mmap.PROT_READ)", "finished",
     "OSError: [Errno 19]"),
    ("memory_behind_an_ended_thread", SEVERAL.format(count=6, body="def later():\n time.sleep(0.2)\n"
     " keep(b'x' * (40 << 20))\n" + LEAVE_TO.format("later")), "memory", "not run: memory",
     Limits(memory_bytes=192 << 20)),
    ("memory_behind_ended_threads_in_a_row", SEVERAL.format(count=3, body="def later():\n"
     " if os.fork() == 0: exec(LAST, globals())\n time.sleep(0.4)\n keep(b'x' * (40 << 20))\n"
     "def last():\n time.sleep(0.4)\n keep(b'x' * (40 << 20))\n"
     "LAST = " + repr(LEAVE_TO.format("last")) + "\n" + LEAVE_TO.format("later")), "memory", "not run: memory",
     Limits(memory_bytes=192 << 20)),
    ("full_sockets", SEVERAL.format(count=4, body="keep([fill(*socket.socketpair()) for _ in range(60)])"), "memory",
     "not run: memory", Limits(memory_bytes=100 << 20, open_files=128)),
    ("full_sockets_of_a_process_that_hides", SEVERAL.format(count=4, body="libc.prctl(4, 0, 0, 0, 0)\n"
     "keep([fill(*socket.socketpair()) for _ in range(60)])"), "memory", "not run: memory",
     Limits(memory_bytes=100 << 20, open_files=128)),
    ("full_pipes", SEVERAL.format(count=8, body="keep([fill(*os.pipe()) for _ in range(200)])"), "memory",
     "not run: memory", Limits(memory_bytes=128 << 20, open_files=512)),
    ("many_mappings", SEVERAL.format(count=8, body=MAP_OFTEN), "memory", "not run: memory",
     Limits(memory_bytes=144 << 20)),
    ("many_mappings_behind_an_ended_thread", SEVERAL.format(count=16, body="def later():\n time.sleep(0.2)\n"
     " exec(MAP_OFTEN)\n keep(0)\nMAP_OFTEN = " + repr(MAP_OFTEN) + "\n" + LEAVE_TO.format("later")), "memory",
     "not run: memory", Limits(memory_bytes=240 << 20, processes=64)),
    ("files_and_pages", SEVERAL.format(count=2, body="for _ in range(44): open(f'/tmp/{number}', 'ab').write("
     "bytes(1 << 20))"), "memory", "not run: memory", Limits(memory_bytes=96 << 20, disk_bytes=90 << 20)),
    ("name_that_lies", "import ctypes\nctypes.CDLL(None).prctl(15, b'VmSize: a kB', 0, 0, 0)\nimport time\n"
     "time.sleep(0.2)\ndef f(x): return 0", "finished", "value 0"),
    ("recursion", "def f(x): return f(x)", "finished", "RecursionError"),
    ("output_without_end", "while True: print('x' * 1000)", "output", "not run: output"),
    ("errors_without_end", "import sys\nwhile True: sys.stderr.write('x' * 1000)", "output", "not run: output"),
    ("results_without_end", "import os\nwhile True: os.write(4, b'x' * 60000)", "results", "not run: results"),
    ("result_too_large", "def f(x): return 'x' * (2 << 20)", "results", "not run: results"),
    ("crash", "import ctypes; ctypes.string_at(0)", "signal", "not run: signal"),
    ("kills_its_group", "import os; os.killpg(0, 9)", "signal", "not run: signal"),
    # values that are none
    ("always_equal", "class A:\n __eq__ = lambda s, o: True\n __hash__ = lambda s: 42\ndef f(x): return A()",
     "finished", "not a plain value"),
    ("always_equal_int", "class A(int):\n __eq__ = lambda s, o: True\n __hash__ = lambda s: 42\n"
     "def f(x): return A(42)", "finished", "not a plain value"),
    ("always_equal_str", "class A(str):\n __eq__ = lambda s, o: True\ndef f(x): return A('42')", "finished",
     "not a plain value"),
    ("hidden_in_a_list", "class A(int): pass\ndef f(x): return [A(42)]", "finished", "not a plain value"),
    ("claims_to_be_int", "class A:\n __class__ = int\ndef f(x): return A()", "finished", "not a plain value"),
    ("generator", "def f(x): yield 42", "finished", "not a plain value"),
    ("function", "def f(x): return f", "finished", "not a plain value"),
    ("true_for_one", "def f(x): return 42.0", "finished", "value 42.0"),
    ("nan", "def f(x): return float('nan')", "finished", "value nan"),
    ("nested_result", "def f(x):\n for _ in range(10 ** 5): x = [x]\n return x", "finished", "nested more than"),
    ("contains_itself", "def f(x):\n x = []\n x.append(x)\n return x", "finished", "nested more than"),
    ("doubling_result", "def f(x):\n for _ in range(45): x = [x, x]\n return x", "finished", "items"),
    ("int_of_a_million_digits", "def f(x): return 10 ** 10 ** 6", "finished", "bits"),
    # the harness
    ("prints_the_answer", "def f(x): print(42)", "finished", "value None"),
    ("prints_a_record", "print('[\"result\", 0, [\"int\", \"0x2a\"], null]')\ndef f(x): return 0", "finished",
     "value 0"),
    ("record_to_every_descriptor", "import os\nfor n in range(256):\n try: os.write(n, b'\\n[\"result\", 0, "
     "[\"int\", \"0x2a\"], null]\\n[\"end\"]\\n')\n except OSError: pass\ndef f(x): return 0", "finished", "value 0"),
    ("closes_everything", "import os; os.closerange(0, 256)\ndef f(x): return 42", "exited", "not run: exited"),
    ("patched_builtins", "import builtins\nfor n in ('print', 'len', 'repr', 'open', 'hash', 'sorted', 'getattr'):\n"
     " setattr(builtins, n, lambda *a, **k: 42)\ndef f(x): return 0", "exited", "not run"),
    ("patched_import", "import builtins\nbuiltins.__import__ = None\ndef f(x): return 0", "finished", "value 0"),
    ("patched_json", "import json\njson.dumps = json.loads = lambda *a, **k: '42'\ndef f(x): return 0", "finished",
     "value 0"),
    ("patched_os", "import os\nos.write = lambda *a: 99\nos.getpid = lambda: 42\ndef f(x): return 0", "finished",
     "value 0"),
    ("other_modules", "import sys; sys.modules.clear()\ndef f(x): return 0", "finished", "value 0"),
    ("trace_function", "import sys; sys.settrace(lambda *a: (_ for _ in ()).throw(SystemExit(0)))\n"
     "def f(x): return 42", "exited", "not run"),
    # the nonce, found by looking for it on purpose: a record out of turn voids the run
    ("forged_then_genuine", FIND_NONCE + "forge('[\"result\", 0, [\"int\", \"0x2a\"], null]')\ndef f(x): return 0",
     "forged", "not run: forged"),
    ("forged_out_of_turn", FIND_NONCE + "forge('[\"result\", 7, [\"int\", \"0x2a\"], null]')"
     + LEAVE, "forged", "not run"),
    ("forged_end", FIND_NONCE + "forge('[\"end\"]')\ndef f(x): return 42", "forged", "not run: forged"),
    ("forged_nesting", FIND_NONCE + "forge('[' * 200000)"
     + LEAVE, "forged", "not run: forged"),
    ("forged_long_int", FIND_NONCE + "forge('[\"result\", 0, ' + '9' * 500000 + ', null]')"
     + LEAVE, "forged", "not run"),
    ("forged_long_hex", FIND_NONCE + "forge('[\"result\", 0, [\"int\", \"0x' + '9' * 500000 + '\"], null]')"
     + LEAVE, "forged",
     "not run: forged"),
    ("forged_nan", FIND_NONCE + "forge('[\"result\", 0, NaN, null]')"
     + LEAVE, "forged", "not run: forged"),
    ("forged_tag", FIND_NONCE + "forge('[\"result\", 0, [\"object\", 1], null]')"
     + LEAVE, "forged", "not run: forged"),
    ("forged_keys", FIND_NONCE + "forge('[\"result\", 0, [\"set\", [\"list\"]], null]')"
     + LEAVE, "forged", "not run: forged"),
    ("forged_collisions", FIND_NONCE + "import itertools\npairs = itertools.product(('[\"int\",\"-0x1\"]', "
     "'[\"int\",\"-0x2\"]'), repeat=11)\n"
     "forge('[\"result\", 0, [\"set\",' + ','.join('[\"tuple\",' + ','.join(p) + ']' for p in pairs) + '], null]')"
     + LEAVE,
     "forged", "not run: forged"),
    ("forged_float", FIND_NONCE + "forge('[\"result\", 0, [\"float\", \"0x1p99999\"], null]')"
     + LEAVE, "forged", "not run: forged"),
    ("forged_int_above_the_limit", FIND_NONCE + "forge('[\"result\", 0, [\"int\", \"' + hex(1 << 14000) + '\"], null]')"
     + LEAVE, "forged", "not run: forged"),
    ("forged_spelling", FIND_NONCE + "forge('[\"result\", 0, [\"int\", \" 0X_2A\"], null]')"
     + LEAVE, "forged", "not run: forged"),
    ("forged_bytes", FIND_NONCE + "os.write(4, b'\\n' + nonce.encode() + b' \\xff\\xfe\\n')"
     + LEAVE, "forged", "not run"),
]  # fmt: skip

PRELUDE = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def code_of(result):
    return 0 if result >= 0 else ctypes.get_errno()
def attempt(function, *args):
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return 0
"""
# name, body of f(x), what f must return, with the filter or without; x is a dict of what the test prepared.
REACHING: list[tuple[str, str, Any, bool]] = [
    ("environment", "return dict(os.environ)", process.ENVIRONMENT, True),
    ("files_of_the_host", "return [p for p in x['paths'] if os.path.exists(p)]", [], True),
    ("no_proc_no_sys", "return [os.path.exists(p) for p in ('/proc', '/sys', '/host', '/etc/passwd')]", [False] * 4,
     False),
    ("installed_packages", "return [n for p in x['packages'] if os.path.isdir(p) for n in os.listdir(p)]", [], True),
    ("arguments_of_the_host", "return [a for a in sys.argv if a != '-c']", [], True),
    ("open_descriptors", "return [n for n in range(1024) if attempt(os.fstat, n) == 0]", [0, 1, 2, 4], False),
    ("standard_input", "return sys.stdin.read()", "", True),
    ("writes_to_the_interpreter", "return attempt(open, os.__file__, 'a') in (13, 30)", True, False),
    ("writes_to_programs", "return attempt(open, '/usr/bin/mine', 'w')", errno.EROFS, False),
    ("writes_to_the_root", "return attempt(os.mkdir, '/mine')", errno.EROFS, False),
    ("writes_to_etc", "return attempt(open, '/etc/ld.so.cache', 'a') in (13, 30)", True, False),
    ("removes_programs", "return attempt(os.remove, '/usr/bin/bash')", errno.EROFS, False),
    ("fills_the_disk",
     "return attempt(lambda: [open(f'/tmp/{n}', 'wb', 0).write(b'x' * (1 << 20)) for n in range(99)])",
     errno.ENOSPC, True),
    ("one_large_file", "return attempt(lambda: open('/tmp/a', 'wb').truncate(1 << 40))", errno.EFBIG, True),
    ("many_files",
     "return attempt(lambda: [open(f'/tmp/{n}', 'wb').close() for n in range(9999)])", errno.ENOSPC, True),
    ("many_descriptors", "return attempt(lambda: [os.dup(0) for _ in range(9999)])", errno.EMFILE, True),
    ("link_out", "os.symlink('/host/etc/passwd', '/tmp/a'); return attempt(open, '/tmp/a')", errno.ENOENT, True),
    ("link_up", "os.symlink('/../../..', '/tmp/a'); return sorted(os.listdir('/tmp/a')) == sorted(os.listdir('/'))",
     True, False),
    ("hard_link_out", "return attempt(os.link, '/usr/bin/bash', '/tmp/bash')", errno.EXDEV, False),
    ("tcp", "return attempt(socket.create_connection, ('127.0.0.1', x['port']), 1)", errno.EPERM, True),
    ("tcp_unfiltered", "return attempt(socket.create_connection, ('127.0.0.1', x['port']), 1)", errno.ENETUNREACH,
     False),
    ("dns", "\n try: return socket.getaddrinfo('example.com', 80)\n except OSError: return 'none'", "none", False),
    ("raw_socket", "return attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)", errno.EPERM, False),
    ("unix_socket", "return attempt(lambda: socket.socket(socket.AF_UNIX).connect(x['unix']))", errno.EPERM, True),
    ("unix_socket_unfiltered", "return attempt(lambda: socket.socket(socket.AF_UNIX).connect(x['unix']))",
     errno.ENOENT, False),
    ("abstract_socket_unfiltered", "return attempt(lambda: socket.socket(socket.AF_UNIX).connect(x['abstract']))",
     errno.ECONNREFUSED, False),
    ("kills_its_parent", "os.kill(os.getppid(), 9); return os.getppid()", 1, False),
    ("terminates_its_parent", "os.kill(1, 15); os.kill(1, 19); os.kill(1, 11); return 'alive'", "alive", False),
    ("kills_everyone", "return attempt(os.kill, -1, 9)", errno.ESRCH, False),
    ("kills_the_test", "return attempt(os.kill, x['pid'], 9)", errno.ESRCH, False),
    ("traces_init", "return code_of(libc.ptrace(16, 1, 0, 0))", errno.EPERM, True),
    ("traces_init_unfiltered", "return code_of(libc.ptrace(16, 1, 0, 0))", errno.EPERM, False),
    ("limits_init_unfiltered", "import resource\n return attempt(resource.prlimit, 1, 0, (0, 0))", errno.EPERM, True),
    ("raises_limits", "import resource\n"
     " try: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))\n except (OSError, ValueError): return 'no'",
     "no", True),
    ("raises_limits_unfiltered", "import resource\n"
     " try: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))\n except (OSError, ValueError): return 'no'",
     "no", False),
    ("mounts", "return code_of(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''))", errno.EPERM, True),
    ("mounts_unfiltered", "return code_of(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''))", errno.EPERM, False),
    ("unmounts_unfiltered", "return code_of(libc.umount2(b'/tmp', 2))", errno.EPERM, False),
    ("unshares", "return code_of(libc.unshare(0x10000000))", errno.EPERM, True),
    ("clones_a_namespace", "return code_of(libc.syscall(x['clone'], 0x10000000 | 17, 0, 0, 0, 0))", errno.EPERM, True),
    ("root_again_unfiltered", "return [code_of(libc.unshare(0x10020000)), "
     "code_of(libc.mount(b'none', b'/usr/bin', None, 32 | 4096, b'')), code_of(libc.umount2(b'/usr/bin', 2))]",
     [0, errno.EPERM, errno.EINVAL], False),
    ("chroot", "return attempt(os.chroot, '/tmp')", errno.EPERM, True),
    ("chroot_unfiltered", "return attempt(os.chroot, '/tmp')", errno.EPERM, False),
    ("device_file_unfiltered", "return attempt(os.mknod, '/tmp/a', 0o60644, os.makedev(8, 0))", errno.EPERM, False),
    ("becomes_root", "return [attempt(function, n) in (1, 22) for function, n in ((os.setuid, 0), (os.setgid, 0), "
     "(os.setgroups, [0]))]", [True] * 3, False),
    ("no_new_privileges", "return libc.prctl(39, 0, 0, 0, 0)", 1, False),
    ("capabilities", "\n data = (ctypes.c_uint32 * 6)()\n"
     " libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), data)\n return list(data)", [0] * 6, False),
    ("bounding_set", "return [c for c in range(64) if libc.prctl(23, c, 0, 0, 0) > 0]", [], False),
    ("setuid_programs",
     "return [bool(os.statvfs(p).f_flag & 2) for p in ('/usr/bin', '/tmp', os.path.dirname(os.__file__))]",
     [True] * 3, False),
    ("memory_files", "return attempt(os.memfd_create, 'a')", errno.EPERM, True),
    ("host_name", "return [os.uname().nodename, attempt(socket.sethostname, 'mine')]", ["sandbox", errno.EPERM], False),
    ("search_of_memory", "\n import gc\n seen = [repr(o) for o in gc.get_objects() if type(o) in (list, dict, tuple)]\n"
     " frame = sys._getframe()\n while frame: seen.append(repr(dict(frame.f_locals))); frame = frame.f_back\n"
     " return any('the expected ' + 'answer' in text for text in seen)", False, True),
]  # fmt: skip


SLOW = ("many_mappings_behind_an_ended_thread",)


@pytest.mark.parametrize(
    "attack", [pytest.param(a, id=a[0], marks=[pytest.mark.slow] * (a[0] in SLOW)) for a in SCORED]
)
def test_attack_is_not_scored(attack: tuple[Any, ...]) -> None:
    _, code, ended, error = attack[:4]
    outcome = run_python(code, calls=[Call("f", (41,))], limits=attack[4] if len(attack) > 4 else QUICK)
    (result,) = outcome.results
    assert not result.is_value(RIGHT)
    assert outcome.ended == ended, outcome
    assert error in (f"value {result.value}" if result.error is None else result.error), outcome


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What attacks try to reach: a secret file and variable, an inheritable descriptor, servers that wait for them."""
    secret = tmp_path / "secret"
    secret.write_text("the expected answer")
    monkeypatch.setenv("SECRET_TOKEN", "the expected answer")
    descriptor = os.open(secret, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    tcp, unix, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(1)
    name = "\0" + secrets.token_hex(8)
    home = Path(os.path.expanduser("~"))
    paths = [secret, ROOT, ROOT / "pyproject.toml", *home.glob("[!.]*"), home / ".bashrc", home / ".ssh", "/etc/shadow"]
    with tcp, unix, abstract:
        unix.bind(str(tmp_path / "socket"))
        abstract.bind(name)
        for server in (unix, abstract):
            server.listen()
        tcp.setblocking(False)
        yield {
            "paths": [str(path) for path in paths],
            "packages": [path for path in sys.path if path.endswith("-packages")],
            "port": tcp.getsockname()[1],
            "unix": str(tmp_path / "socket"),
            "abstract": name,
            "pid": os.getpid(),
            "clone": {"x86_64": 56, "aarch64": 220}[os.uname().machine],
        }
        with pytest.raises(BlockingIOError):
            tcp.accept()  # nobody came
    os.close(descriptor)
    assert secret.read_text() == "the expected answer"


@pytest.mark.slow
@pytest.mark.parametrize("attack", REACHING, ids=lambda attack: attack[0])
def test_attack_reaches_nothing(attack: tuple[Any, ...], prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, body, expected, filtered = attack
    if not filtered:
        monkeypatch.setattr(process, "seccomp_filter", lambda: ALLOW_ALL)
    code = PRELUDE + f"def f(x):\n {body}\n"
    outcome = run_python(code, calls=[Call("f", (prepared,))], limits=QUICK)
    assert outcome.results[0].is_value(expected), outcome


# Attacks that need a test of their own; each function is one.
OWN: list[Any] = []


def attack(test: Any) -> Any:
    OWN.append(test)
    return test


def named(name: str) -> list[int]:
    """Processes of this machine that call themselves `name`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [int(path.parent.name)] if path.read_text().strip() == name else []
        except OSError:
            continue  # ended meanwhile
    return found


def gone(name: str) -> bool:
    for _ in range(100):
        if not named(name):
            return True
        time.sleep(0.05)
    return False


CALL_MYSELF = "import ctypes, os, time\nctypes.CDLL(None).prctl(15, {name!r}.encode(), 0, 0, 0)\n"


@attack
def test_daemon_does_not_outlive_the_run() -> None:
    name = secrets.token_hex(6)
    code = CALL_MYSELF.format(name=name) + (
        "if os.fork() == 0:\n os.setsid()\n"
        " if os.fork() == 0:\n  os.closerange(0, 99)\n  time.sleep(99)\n os._exit(0)\n"
        "time.sleep(0.3)\ndef f(x): return 'daemon'"
    )
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_python, code, calls=[Call("f", (1,))], limits=QUICK)
        until = time.monotonic() + 5
        while len(named(name)) < 2 and time.monotonic() < until and not run.done():
            time.sleep(0.01)
        assert len(named(name)) >= 2  # it was there, seen from outside
        assert run.result().results[0].is_value("daemon")
    assert named(name) == []  # at once: the run returns when everything has ended


@attack
def test_nothing_outlives_a_caller_that_is_killed() -> None:
    name = secrets.token_hex(6)
    code = CALL_MYSELF.format(name=name) + "time.sleep(99)"
    program = f"from smallcoder_jax.sandbox.run import *\nrun_python({code!r}, limits=Limits(wall_s=60))"
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until = time.monotonic() + 20
    while not named(name) and time.monotonic() < until:
        time.sleep(0.02)
    assert named(name)
    caller.kill()
    caller.wait()
    assert gone(name)


@attack
def test_nothing_outlives_a_launcher_that_is_killed() -> None:
    name = secrets.token_hex(6)
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_python, CALL_MYSELF.format(name=name) + "time.sleep(99)", limits=Limits(wall_s=30))
        until = time.monotonic() + 10
        while not named(name) and time.monotonic() < until:
            time.sleep(0.02)
        (inside,) = named(name)
        parent = int(re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{inside}/status").read_text())[0])  # init
        launcher = int(re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{parent}/status").read_text())[0])
        os.kill(launcher, signal.SIGKILL)
        with pytest.raises(UserError, match="launcher ended"):
            run.result()
    assert gone(name)


@attack
def test_leaves_no_files() -> None:
    name = secrets.token_hex(8)
    assert run_command(f"touch /tmp/{name}; ls /tmp").stdout == f"{name}\n"
    assert not (Path("/tmp") / name).exists()
    assert run_command("ls -A /tmp").stdout == ""  # nor for the next run


@attack
def test_leaves_no_core() -> None:
    outcome = run_command("python -c 'import os; os.abort()' ; echo $?; ls -A")
    assert outcome.stdout == "134\n"


@attack
def test_types_into_no_terminal() -> None:
    code = PRELUDE + "def f(x): return [code_of(libc.ioctl(0, n, b'x')) for n in (0x5412, 0x541C, 0x5401)]"
    # 0x5401 reads the settings of a terminal, and gets the answer of what is none.
    assert run_python(code, calls=[Call("f", (1,))]).results[0].is_value([errno.EPERM, errno.EPERM, errno.ENOTTY])


@attack
def test_output_that_is_no_text() -> None:
    outcome = run_python("import sys\nsys.stdout.buffer.write(b'a\\xff\\xfeb\\0')\nprint('\\x1b[2J')")
    assert outcome.stdout == "a\ufffd\ufffdb\0\x1b[2J\n"


@attack
def test_output_is_cut_at_its_limit() -> None:
    outcome = run_python("import os\nwhile True: os.write(1, b'x' * 1000)", limits=Limits(output_bytes=5000))
    assert (outcome.ended, outcome.stdout, outcome.exit_code) == ("output", "x" * 5000, None)


def test_script_ends_as_it_would_anywhere() -> None:
    assert run_python("import sys; sys.exit(3)").exit_code == 3
    assert run_python("import os; os._exit(0)").ended == "exited"
    outcome = run_python("def g():\n    return 1 / 0\nprint('here')\ng()")
    assert (outcome.ended, outcome.error, outcome.exit_code) == ("finished", "ZeroDivisionError: division by zero", 1)
    assert outcome.stdout == "here\n"
    assert "return 1 / 0" in outcome.stderr
    assert "in run" not in outcome.stderr  # the harness does not show


@attack
@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "", "a\0b"])
def test_files_that_lead_out(name: str) -> None:
    with pytest.raises(UserError, match="no path below"):
        run_command("true", files={name: "x"})


@attack
def test_files_that_are_too_large() -> None:
    with pytest.raises(UserError, match=r"above Limits\.disk_bytes"):
        run_command("true", files={"a": "x" * (20 << 20)})


@attack
@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "def f(x):\n import os; os._exit(0)",
     "def f(x):\n import sys; sys.exit(0)", "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): return 0"],
)  # fmt: skip
@pytest.mark.parametrize(
    "tests",
    ["import unittest\nclass A(unittest.TestCase):\n def test_f(self): self.assertEqual(f(41), 42)",
     "def test_f(): assert f(41) == 42", "assert f(41) == 42"],
)  # fmt: skip
def test_leaving_early_passes_no_tests(code: str, tests: str) -> None:
    assert not run_tests(code, tests).passed
    assert run_tests("def f(x): return x + 1", tests).passed  # which a right function does


@attack
def test_always_equal_object_passes_no_doctest() -> None:
    code = "class A:\n __eq__ = lambda s, o: True\ndef f(x): return A()"
    assert not run_doctests(code, ">>> f(41)\n42\n").passed


@attack
def test_true_is_no_one_in_a_doctest() -> None:
    """Which doctest itself takes for the same."""
    report = run_doctests("def f(x): return x", ">>> f(True)\n1\n>>> f(False)\n0\n>>> f(1)\n1\n")
    assert [test.error is None for test in report.tests] == [False, False, True]


@attack
def test_patched_test_frameworks_do_not_change_doctests() -> None:
    """What `run_tests` cannot keep out, and says so: comparing here is what does."""
    code = (
        "import doctest, unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        "doctest.OutputChecker.check_output = lambda *a: True\ndef f(x): return 0"
    )
    report = run_doctests(code, "Text.\n\n>>> f(41)\n42\n>>> f(0)\n0\n")
    assert [test.error for test in report.tests] == ["expected '42\\n', got '0\\n'", None]
    assert not report.passed
    tests = "import unittest\nclass A(unittest.TestCase):\n def test_f(self): self.assertEqual(f(41), 42)"
    assert run_tests(code, tests).passed  # the documented hole: nothing is to be rewarded for this


@attack
def test_a_forged_value_is_compared_like_any_other() -> None:
    """Forging a record is another way to return a value, and the value has to be right all the same."""
    forge = FIND_NONCE + 'forge(\'["result", 0, ["int", "ANSWER"], null]\')\nos._exit(0)'
    assert not run_python(forge.replace("ANSWER", "0x0"), calls=[Call("f", (41,))]).results[0].is_value(RIGHT)
    outcome = run_python(forge.replace("ANSWER", "0x2a"), calls=[Call("f", (41,)), Call("f", (42,))])
    assert [result.error for result in outcome.results] == [None, "not run: exited"]


def almost_a_value(draw: random.Random, depth: int = 3) -> Any:
    """What might stand in a record where a value does: right, slightly wrong, or of another kind altogether."""
    texts = ["0x2a", "-0x1", "0X2A", " 0x1", "0x1_0", "0x", "", "nan", "-nan", "inf", "0x1p99999", "0x1p-99999",
             "1e400", hex(1 << 14000), hex((1 << 14000) - 1), "00ff", "0 0", "zz", "\ud800", "0x1.8p+0",
             "x" * 5000]  # fmt: skip
    leaves = [None, True, 0, 1, -1, 1.5, 1e308, float("inf"), float("nan"), 1 << 14000, *texts, {}, {"a": [1]}, []]
    kind = draw.randrange(4)
    if kind == 0 or depth == 0:
        return draw.choice(leaves)
    if kind == 1:
        return [draw.choice(["int", "float", "bytes"]), draw.choice(texts)][: draw.choice([1, 2, 2, 2, 2])]
    items = [almost_a_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if draw.random() < 0.5:
        items = [[item, almost_a_value(draw, depth - 1)] for item in items]
    return [draw.choice(["list", "tuple", "set", "dict", "object", 1]), *items]


@attack
def test_forged_records_of_any_form() -> None:
    """Whatever a record holds, reading it gives results that can be compared, or the errors that mean "forged"."""
    draw, read = random.Random(0), 0
    for number in range(4000):
        kind = draw.choice(["calls", "calls", "tests", "doctests", "script"])
        parts = [draw.choice(["result", "result", "result", "failed", "end", None, []]),
                 draw.choice([0, 0, 0, 0, 1, -1, True, 0.0, "0"]), almost_a_value(draw),
                 draw.choice([None, None, "an error", "\ud800", 1, []])]  # fmt: skip
        line = json.dumps(parts if draw.random() < 0.9 else parts[: draw.randrange(4)]).encode()
        if draw.random() < 0.2:
            at = draw.randrange(len(line))
            line = line[:at] + draw.randbytes(draw.randrange(3)) + line[at + draw.randrange(3) :]
        try:
            results, _, _ = sandbox._read_records(b"noise\nnonce " + line + b"\n", "nonce", kind, 2)
        except sandbox.FORGED:
            continue
        for result in results:
            assert result.error is not None or result.is_value(result.value), (number, line)
        read += len(results)
    assert read > 50  # values that came through


@attack
def test_a_value_has_one_spelling() -> None:
    """What a caller reads can be written again, and is the same: nothing that `encode` refuses comes in."""
    for value in [*VALUES, (1 << worker.MAX_INT_BITS) - 1, {math.nan}, [math.nan, -math.inf, 5e-324]]:
        data = json.loads(json.dumps(worker.encode(value)))
        assert same_value(worker.decode(data), value)
    for data in (["int", "0x02"], ["float", "0x1p0"], ["bytes", "00 00"], ["bytes", "FF"], ["set", None, None],
                 ["set", "b", "a"], ["dict", ["a", None], ["a", True]], ["float", "-0x0.0p+0"]):  # fmt: skip
        with pytest.raises(ValueError, match="form"):
            worker.decode(data)


def test_at_a_limit_only_what_is_below_is_killed() -> None:
    """A number that has passed to a process from elsewhere, between a look and the kill, is not killed for it."""
    code = "import os, time\nfor _ in range(3): os.fork() or time.sleep(60)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as top, \
            subprocess.Popen(["sleep", "60"]) as other:  # fmt: skip
        assert top.stdout is not None
        assert top.stdout.readline() == b"\n"
        usage = memory.Usage(top.pid, 0)
        below = [pid for pid in usage.processes if pid != top.pid]
        usage.processes.append(other.pid)
        memory.kill_at_once(usage, top.pid)
        for _ in range(200):
            states = [re.findall(r"State:\s+(\w)", Path(f"/proc/{pid}/status").read_text())[0] for pid in below]
            if states == ["Z"] * 3:
                break
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.1)
        assert top.poll() is None
        top.kill()
        other.kill()
    assert states == ["Z"] * 3


def test_the_host_s_files_are_not_memory_of_a_run() -> None:
    """Init has them before it builds the sandbox's own, which may take longer than the first look."""
    with subprocess.Popen(["sleep", "60"]) as init:
        assert memory.Usage(init.pid, 0).disk == 0
        init.kill()
    with subprocess.Popen(["bash", "-c", "sleep 60; true"], start_new_session=True) as parent:
        while len((usage := memory.Usage(parent.pid, 0)).processes) < 2:
            time.sleep(0.01)
        assert usage.disk > 0
        os.killpg(parent.pid, signal.SIGKILL)


def test_attacks_are_counted() -> None:
    count = len(SCORED) + len(REACHING) + len(OWN)
    names = [attack[0] for attack in (*SCORED, *REACHING)]
    assert len(set(names)) == len(names)
    assert f"{count} attacks" in (ROOT / "docs" / "architecture.md").read_text()


# Right answers pass.

VALUES = [None, True, 0, -5, 10**1000, 0.1, -0.0, math.inf, "", "\udc80 ü \0", b"\0\xff", [], [1, [2, (3,)]], (), {},
          set(), {"a": [1], 2: {3}, (4, "b"): None, None: 1.5}, {1, "1", (1,), b"1", None},
          list(range(5000))]  # fmt: skip


def test_plain_values_go_in_and_come_back() -> None:
    outcome = run_python("def f(*args, **kwargs):\n    return args[0] if args else kwargs", calls=[
        *[Call("f", (value,)) for value in VALUES], Call("f", kwargs={"a": 1, "b": [2]})])  # fmt: skip
    assert outcome.ended == "finished"
    for value, result in zip([*VALUES, {"a": 1, "b": [2]}], outcome.results, strict=True):
        assert result.is_value(value), (value, result)
        assert type(result.value) is type(value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1, True, False), (1, 1.0, False), ([1], (1,), False), ({1}, {True}, False), ({1: 2}, {1.0: 2}, False),
     (math.nan, math.nan, True), (0.0, -0.0, True), ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({3, 1}, {1, 3}, True),
     ("1", b"1", False), ([1, 2], [2, 1], False), (None, False, False), ("", None, False)],
)  # fmt: skip
def test_values_are_compared_by_exact_type(one: Any, other: Any, same: bool) -> None:
    assert same_value(one, other) is same
    assert same_value([one], [other]) is same


def test_calls_share_what_the_code_keeps_and_errors_stay_with_their_call() -> None:
    code = "seen = []\ndef f(x):\n    seen.append(x)\n    print(x)\n    return 10 // x, len(seen)"
    outcome = run_python(code, calls=[Call("f", (n,)) for n in (5, 0, 2)])
    assert [result.value for result in outcome.results] == [(2, 1), None, (5, 3)]
    assert outcome.results[1].error == "ZeroDivisionError: integer division or modulo by zero"
    assert (outcome.stdout, outcome.stderr, outcome.exit_code) == ("5\n0\n2\n", "", 0)


def test_calls_before_a_limit_keep_their_values() -> None:
    code = "import time\ndef f(x):\n    time.sleep(99 * (x == 2))\n    return x"
    outcome = run_python(code, calls=[Call("f", (n,)) for n in range(4)], limits=Limits(wall_s=0.7))
    assert [result.value for result in outcome.results] == [0, 1, None, None]
    assert [result.error for result in outcome.results] == [None, None, "not run: wall", "not run: wall"]


def test_ordinary_programs_run() -> None:
    code = """
import asyncio, collections, dataclasses, datetime, functools, hashlib, itertools, math, random, re, subprocess
from concurrent.futures import ThreadPoolExecutor
@dataclasses.dataclass
class Point:
    x: int
async def later(x):
    await asyncio.sleep(0.01)
    return x
def f(x):
    with ThreadPoolExecutor(4) as pool:
        squares = list(pool.map(lambda n: n * n, range(4)))
    with open("notes.txt", "w") as file:
        file.write("kept")
    shell = subprocess.run(["bash", "-c", "cat notes.txt | tr a-z A-Z"], capture_output=True, text=True).stdout
    return Point(x).x, asyncio.run(later(x)), squares, shell, hashlib.sha256(b"a").hexdigest()[:8]
"""
    (result,) = run_python(code, calls=[Call("f", (7,))]).results
    assert result.is_value((7, 7, [0, 1, 4, 9], "KEPT", "ca978112")), result


def test_memory_that_a_program_lends_while_it_starts_another_counts_once() -> None:
    code = (
        "import subprocess, time\nkept, count, end = b'x' * (150 << 20), 0, time.monotonic() + 1\n"
        "while time.monotonic() < end: count += subprocess.run(['true']).returncode == 0\ndef f(): return count > 9"
    )
    outcome = run_python(code, calls=[Call("f")], limits=Limits(memory_bytes=256 << 20))
    assert outcome.results[0].is_value(True), outcome


def test_pairs_of_sockets_are_there_for_event_loops() -> None:
    code = """
import asyncio, socket
async def f():
    one, other = socket.socketpair()
    reader, kept = await asyncio.open_connection(sock=one)
    unread, writer = await asyncio.open_connection(sock=other)
    writer.write(b"x" * 100_000)
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    output, _ = await process.communicate(b"y" * 100_000)
    return len(await reader.readexactly(100_000)), len(output)
def g():
    return asyncio.run(f())
"""
    outcome = run_python(code, calls=[Call("g")])
    assert outcome.results[0].is_value((100_000, 100_000)), outcome


def test_script_runs_as_main() -> None:
    outcome = run_python("if __name__ == '__main__':\n    print('ü')")
    assert (outcome.ended, outcome.stdout, outcome.results, outcome.exit_code) == ("finished", "ü\n", (), 0)


def test_commands_see_their_files() -> None:
    outcome = run_command("cat data/a.txt; python prog.py; echo no >&2; exit 3",
                          files={"data/a.txt": "one\n", "prog.py": "print(1 + 1)"})  # fmt: skip
    assert (outcome.stdout, outcome.stderr, outcome.exit_code, outcome.ended) == ("one\n2\n", "no\n", 3, "finished")


def test_doctests_with_exceptions_and_flags() -> None:
    text = (
        ">>> f(1)\n2\n>>> f('a')\nTraceback (most recent call last):\n    ...\n"
        'TypeError: can only concatenate str (not "int") to str\n'
        ">>> list(range(20))  # doctest: +ELLIPSIS\n[0, 1, ..., 19]\n>>> x = f(4)\n>>> x\n5\n>>> f(None)\n1\n"
    )
    report = run_doctests("def f(x):\n    return x + 1", text)
    assert [test.error is None for test in report.tests] == [True, True, True, True, True, False]
    assert "raised TypeError" in str(report.tests[-1].error)
    with pytest.raises(UserError, match="doctest cannot be parsed"):
        run_doctests("", ">>>f(1)\n2")


def test_tests_are_reported_one_by_one() -> None:
    tests = (
        "import unittest\nclass A(unittest.TestCase):\n def test_a(self): self.assertEqual(f(1), 2)\n"
        " def test_b(self): self.assertEqual(f(1), 3)\n @unittest.skip('later')\n def test_c(self): pass\n"
        " def test_d(self):\n  for n in (1, 2):\n   with self.subTest(n=n): self.assertEqual(f(n), 2)\n"
        " @unittest.expectedFailure\n def test_e(self): self.assertEqual(f(1), 3)\ndef test_g(): assert f(1) == 2"
    )
    report = run_tests("def f(x): return x + 1", tests)
    assert [(test.name.split(".")[-1], test.error) for test in report.tests] == [
        ("test_a", None), ("test_b", "AssertionError: 2 != 3"), ("test_c", "skipped: later"),
        ("test_d (n=2)", "AssertionError: 3 != 2"), ("test_e", None), ("test_g", None)]  # fmt: skip
    assert not report.passed


def test_many_at_once_do_not_meet() -> None:
    def one(number: int) -> bool:
        outcome = run_python(f"def f(x): return x * {number}", calls=[Call("f", (3,))])
        return outcome.results[0].is_value(3 * number)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(12)))


# Where it cannot isolate, it refuses.


def test_refused_where_namespaces_are_forbidden(tmp_path: Path) -> None:
    """A real refusal: in a process that may not unshare, as in many containers."""
    program = (
        "from smallcoder_jax.sandbox import launch, run, seccomp\n"
        "launch.libc.prctl(38, 1, 0, 0, 0)\n"
        "launch.install_filter(seccomp.seccomp_filter())\n"
        "from smallcoder_jax.base.errors import run_cli\nrun_cli(run.check_isolation)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done
    assert "cannot isolate it here (unshare NEWUSER" in done.stderr
    assert "kernel.unprivileged_userns_clone" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [({"uid_map": "5 77777 1\n6 77777 1"}, "the map of users"), ({"binds": ["/no/such/folder"]}, "/no/such/folder"),
     ({"filter": "00" * 8}, "seccomp"), ({"argv": ["/no/such/program"]}, "/no/such/program"),
     ({"binds": []}, "No such file")],
)  # fmt: skip
def test_refused_where_a_step_fails(change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sandbox.make_plan
    monkeypatch.setattr(sandbox, "make_plan", lambda *args: plan(*args) | change)
    with pytest.raises(UserError, match=message):
        run_python("print(1)")


def test_refused_without_a_filter_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="no system call filter for riscv64"):
        run_python("print(1)")


def test_refused_on_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="needs Linux"):
        run_python("print(1)")


@pytest.mark.parametrize("limits", [{"wall_s": 0}, {"cpu_s": 1.5}, {"processes": -1}, {"wall_s": math.inf},
                                    {"open_files": True}])  # fmt: skip
def test_limits_are_checked(limits: Any) -> None:
    with pytest.raises(UserError, match=rf"Limits\.{next(iter(limits))} is "):
        Limits(**limits)


def test_arguments_are_plain_values() -> None:
    with pytest.raises(UserError, match="a call's arguments hold a object"):
        run_python("", calls=[Call("f", (object(),))])


def test_check_isolation_holds_here() -> None:
    sandbox.check_isolation()


def test_import_is_light() -> None:
    program = "import sys, smallcoder_jax.sandbox.run\nprint([m for m in ('jax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
