"""Runs code that nobody has read, such as a model's answer, where it can neither reach nor harm anything.

Each run is a fresh process in namespaces of its own (users, mounts, network, processes, ipc, host name), as a user
without privileges, with an environment of three fixed variables and no open file but its pipes. It sees the
interpreter, `/usr/bin` and libraries, read-only, and a small `/tmp`; no `/proc`, no home, no network device. Only
system calls that are listed can be made. Time, memory, processes, files and output have limits, and nothing outlives
the run. Where any of it cannot be had, the run is refused (UserError): there is no weaker way to run.

Whether an answer is right is decided here, in the caller's process. What is expected never goes inside: inputs go in,
plain built-in values come back over a pipe of their own, and `same_value` compares them by exact type. So neither an
exit code, nor printed text, nor an object that equals everything counts for anything.

Code shares its interpreter with the harness that calls it, and by searching the harness's memory can find the nonce
that marks records. It can then write records itself: "call 3 returned 7". It gains nothing, as its function could have
returned 7. A record out of turn voids the run. With `run_tests` it is otherwise: there the tests are inside, and code
that tampers with them can claim that they passed. Rewards want `run_python` with calls, or `run_doctests`, whose
expected output stays here.

Not promised: that time is fair between runs on a busy machine; secrecy of world-readable files below `/usr/lib` and
`/usr/bin`; protection from errors of the kernel itself, or of the processor.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.evaluate import sandbox_launch, sandbox_worker
from smallcoder_jax.evaluate.sandbox_seccomp import seccomp_filter

# How a run ended: by itself ("exited": before its harness was done); by a signal; at a limit (of `Limits`); or because
# it wrote records that its harness did not ("forged").
Ended = Literal["finished", "exited", "signal", "wall", "cpu", "memory", "output", "results", "forged"]

ENVIRONMENT = {"PATH": "/sandbox/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
SYSTEM = ("/usr/bin", "/usr/lib", "/usr/lib64", "/bin", "/lib", "/lib64", "/usr/share/zoneinfo")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
NOBODY = 65534
GRACE_S = 10.0  # beyond the wall clock's limit, after which the launcher itself is killed
MAX_STATUS = 65536
FORGED = (ValueError, TypeError, RecursionError)  # of reading what the harness would not have written
MAX_ARGUMENT = 128 << 10  # bytes, of Linux


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use.

    `memory_bytes` holds for each process (address space), and for all together: pages, page tables, mappings, `/tmp`,
    and pipes and sockets as if they were full. Shared anonymous memory (`mmap.mmap(-1, n)`) is denied.
    """

    wall_s: float = 10.0
    cpu_s: int = 10  # of each process
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20  # of /tmp, and of each file
    processes: int = 32  # threads count as processes
    open_files: int = 64  # of each process
    output_bytes: int = 64 << 10  # of stdout, and of stderr
    result_bytes: int = 1 << 20  # of all results together, as they travel

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = (int, float) if field.name == "wall_s" else (int,)
            if type(value) not in numbers or not 0 < value < float("inf"):
                raise UserError(f"Limits.{field.name} is {value!r}; expected a number above 0, whole but for wall_s")


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of the code by name, and its arguments: plain built-in values."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call returned, or why there is nothing: its exception, a value that is not plain, how the run ended."""

    value: Any = None
    error: str | None = None

    def is_value(self, expected: Any) -> bool:
        """Whether the call returned `expected`: the same types, the same contents."""
        return self.error is None and same_value(self.value, expected)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run went. Only `results` come from calls; everything else is for reading."""

    ended: Ended
    results: tuple[Result, ...]
    error: str | None  # the exception that kept the code from loading, or that ended a script
    exit_code: int | None  # None after a signal
    stdout: str  # up to the limit; bytes that are not UTF-8 are replaced
    stderr: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Test:
    """A test by name, and why it failed; None: it passed."""

    name: str
    error: str | None


@dataclasses.dataclass(frozen=True)
class TestReport:
    """The tests that were run, in order, and how the run went that they were run in."""

    tests: tuple[Test, ...]
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether there were tests, all passed, and the run came to its end."""
        return bool(self.tests) and self.outcome.ended == "finished" and all(test.error is None for test in self.tests)


def same_value(one: Any, other: Any) -> bool:
    """Whether two plain values are of the same types with the same contents: 1 is neither 1.0 nor True; NaN is NaN.

    ValueError for a value that is not plain, or larger than a result may be.
    """
    return json.dumps(sandbox_worker.encode(one)) == json.dumps(sandbox_worker.encode(other))


def check_isolation() -> None:
    """Starts a sandbox and calls a function in it. UserError says what this machine lacks, and what to do."""
    outcome = run_python("def answer(number):\n    return number + 1", calls=[Call("answer", (41,))])
    if not outcome.results[0].is_value(42):
        raise UserError(f"the sandbox starts here, but a function does not return in it: {outcome}")


def run_python(code: str, *, calls: Sequence[Call] = (), limits: Limits | None = None) -> Outcome:
    """Executes a module's code, then makes the calls in order. Without calls it is a script (`__name__` is `__main__`).

    `results` has one entry for each call, also where the code failed to load or did not come so far.
    UserError: this machine cannot isolate, or an argument is not a plain value.
    """
    try:
        items = [
            [call.function, sandbox_worker.encode(tuple(call.args)), sandbox_worker.encode(dict(call.kwargs))]
            for call in calls
        ]
    except ValueError as error:
        raise UserError(f"a call's arguments hold {error}; pass plain values, which can be copied inside") from None
    outcome = _run_job("calls" if items else "script", code, items, limits or Limits())
    missing = Result(error=f"not run: {outcome.error or outcome.ended}")
    results = outcome.results + (missing,) * (len(items) - len(outcome.results))
    return dataclasses.replace(outcome, results=results)


def run_doctests(code: str, text: str, *, limits: Limits | None = None) -> TestReport:
    """Loads the code, executes the examples (`>>>`) of `text` after it, and compares here what they print.

    Only the examples' sources go inside, so the code can satisfy them by printing the right thing and by nothing else.
    `text` is trusted; its option flags are honoured, and `True` is no `1`. UserError: malformed examples, or this
    machine cannot isolate.
    """
    import doctest

    try:
        examples = doctest.DocTestParser().get_examples(text)
    except ValueError as error:
        raise UserError(f"the doctest cannot be parsed: {error}") from None
    outcome = _run_job("doctests", code, [example.source for example in examples], limits or Limits())
    tests = []
    for index, example in enumerate(examples):
        name = example.source.strip()
        if index >= len(outcome.results):
            tests.append(Test(name, f"not run: {outcome.error or outcome.ended}"))
            continue
        flags = doctest.DONT_ACCEPT_TRUE_FOR_1 | sum(flag for flag, on in example.options.items() if on)
        tests.append(Test(name, _compare_example(example.want, example.exc_msg, outcome.results[index], flags)))
    return TestReport(tuple(tests), dataclasses.replace(outcome, results=()))


def _compare_example(want: str, wanted_exception: str | None, result: Result, flags: int) -> str | None:
    import doctest

    pair = result.value
    if type(pair) is not tuple or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) not in (str, type(None)):
        return "no output came back"
    output, exception = pair
    if (exception is None) != (wanted_exception is None):
        return f"raised {exception.strip()}" if exception else f"did not raise {wanted_exception}"
    if exception is not None:
        want, output = wanted_exception or "", exception
    return None if doctest.OutputChecker().check_output(want, output, flags) else f"expected {want!r}, got {output!r}"


def run_tests(code: str, tests: str, *, limits: Limits | None = None) -> TestReport:
    """Executes tests beside the code: its TestCases and functions `test_*`, or else its statements as one test.

    What ends the process early is no pass, whatever its exit code. But the verdict comes from inside, so code that
    tampers with the tests or with unittest can forge it: use it to show results, not to reward them.
    """
    outcome = _run_job("tests", code, [tests], limits or Limits())
    found = tuple(Test(str(result.value), result.error) for result in outcome.results)
    if outcome.error is not None:
        found += (Test("<code>", outcome.error),)
    return TestReport(found, dataclasses.replace(outcome, results=()))


def run_command(script: str, *, files: Mapping[str, str] | None = None, limits: Limits | None = None) -> Outcome:
    """Runs a bash script in `/tmp` of a sandbox, beside `files` (relative path: text); `python` is this interpreter.

    UserError: this machine cannot isolate, a file's path leads out of the folder, or what is given is too large.
    """
    limits = limits or Limits()
    given = {name: text.encode() for name, text in (files or {}).items()}
    for name in given:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise UserError(f"{name!r} is no path below the working folder; expected one like tests/data.txt")
    size = sum(len(text) + 8192 for text in given.values())
    if size > limits.disk_bytes:
        raise UserError(f"{len(given)} files take {size} bytes, above Limits.disk_bytes = {limits.disk_bytes}")
    if len(script.encode()) >= MAX_ARGUMENT or "\0" in script:
        raise UserError(f"a script of {len(script)} characters; expected less than {MAX_ARGUMENT} bytes, without NUL")
    plan = _plan(["/bin/bash", "-c", script], None, limits) | {"files": {n: t.hex() for n, t in given.items()}}
    run = _Run(plan, limits)
    return Outcome(_ended(run, limits) or "finished", (), None, run.exit_code, run.text(1), run.text(2), run.seconds)


def _run_job(kind: str, code: str, items: list[Any], limits: Limits) -> Outcome:
    """Runs the worker. `results` are those that came back, in order; none if records were forged."""
    nonce = secrets.token_hex(16)
    job = json.dumps({"kind": kind, "nonce": nonce, "code": code, "items": items})
    argv = [_python()[0], "-I", "-S", "-B", "-X", "utf8", "-c", Path(sandbox_worker.__file__).read_text()]
    run = _Run(_plan(argv, job, limits), limits)
    try:
        results, error, done = _read_records(bytes(run.received["records"]), nonce, kind, len(items))
        forged = False
    except FORGED:
        results, error, done, forged = [], None, False, True
    ended = _ended(run, limits) or ("forged" if forged else "finished" if done else "exited")
    return Outcome(ended, tuple(results), error, run.exit_code, run.text(1), run.text(2), run.seconds)


def _read_records(text: bytes, nonce: str, kind: str, count: int) -> tuple[list[Result], str | None, bool]:
    """Results, the error that kept the code from loading, and whether the harness came to its end.

    Records are the lines behind the nonce; other lines are the code's own noise. One of `FORGED`:
    records that the harness, asked for `count` items, would not have written.
    """
    head = f"{nonce} ".encode()
    results: list[Result] = []
    error, done = None, False
    for line in text.split(b"\n")[:-1]:
        if not line.startswith(head):
            continue
        record = json.loads(line[len(head) :])
        if type(record) is not list or not record or done:
            raise ValueError("a record is a list, and none follows the last one")
        if record[0] == "result" and (kind == "tests" or len(results) < count) and kind != "script":
            results.append(_result(record, len(results)))
        elif record == ["end"]:
            done = True
        elif record[0] == "failed" and len(record) == 2 and type(record[1]) is str and not results:
            error, done = record[1], True
        else:
            raise ValueError("an unknown record")
    return results, error, done


def _result(record: list[Any], index: int) -> Result:
    _, number, value, error = record
    if type(number) is not int or number != index or type(error) not in (str, type(None)):
        raise ValueError("a record out of turn")
    return Result(sandbox_worker.decode(value), error)


def _ended(run: _Run, limits: Limits) -> Ended | None:
    """What ended the program, if it did not end by itself."""
    if run.reason is not None:
        return run.reason
    if run.signal is None:
        return None
    return "cpu" if run.signal == signal.SIGXCPU or run.cpu_s >= limits.cpu_s else "signal"


@cache
def _python() -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The interpreter below a virtual environment, what it needs, and the packages installed in it (to be hidden)."""
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
    """What of the host is seen inside, read-only (`binds`), which of it is hidden (`masks`), and symbolic links."""
    program, interpreter, packages = _python()
    wanted = sorted({path for path in (*SYSTEM, *SYSTEM_FILES, *DEVICES, *interpreter) if os.path.exists(path)})
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    binds: list[str] = []
    for path in wanted:
        if path not in links and not any(path.startswith(above + "/") for above in binds):
            binds.append(path)
    links |= {"/sandbox/bin/python": program, "/sandbox/bin/python3": program}
    return {"binds": binds, "masks": [path for path in packages if not os.path.islink(path)], "links": links}


def _plan(argv: list[str], job: str | None, limits: Limits) -> dict[str, Any]:
    """What the launcher is told. Root becomes nobody, so that even outside nothing would belong to the code."""
    user, group, inside = os.geteuid(), os.getegid(), sandbox_launch.INSIDE_ID
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
    """What can wait in one end of a socketpair, at most: its buffer, and half of it once more with the last message."""
    one, other = socket.socketpair()
    with one, other:
        return 3 * one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2


class _Run:
    """One sandbox from start to end, and what came out of it. When it returns, no process of it is left."""

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
        command = [_python()[0], "-I", "-S", "-B", sandbox_launch.__file__, str(status_end), str(records_end)]
        with open(status, "rb", buffering=0) as status_file, open(records, "rb", buffering=0) as records_file:
            try:
                # A new program and not a fork: threads of this process may hold any lock.
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
                    process.kill()  # init hears of it and dies, and everything inside with it
                    raise
        self.seconds = time.monotonic() - start
        self._read_status()

    def text(self, stream: Literal[1, 2]) -> str:
        return self.received[stream].decode(errors="replace")

    def _talk(self, process: subprocess.Popen[bytes], plan: dict[str, Any], status: IO[bytes], records: IO[bytes],
              deadline: float) -> None:  # fmt: skip
        """Sends the plan and reads everything to its end. Closing `stdin` has the launcher take the sandbox down."""
        assert process.stdin is not None  # as the pipes above
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write(json.dumps(plan).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; its status says why
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
        """Whether there is still room for what is read from a stream."""
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
            raise UserError(_refusal(f"its launcher ended without a word; it printed: {self.text(2)[-2000:]!r}"))


def _refusal(why: str) -> str:
    return (
        f"code is not executed: the sandbox cannot isolate it here ({why}). It needs Linux 5.14 or newer with seccomp, "
        "and user namespaces that this user may create. As an ordinary user, look at the settings "
        "kernel.unprivileged_userns_clone (1), kernel.apparmor_restrict_unprivileged_userns (0) and "
        "user.max_user_namespaces (above 0); in a container, allow unshare and mount "
        "(Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN)"
    )
