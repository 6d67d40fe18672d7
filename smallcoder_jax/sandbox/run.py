"""Runs untrusted code, such as a model's answer, isolated from the rest of the machine.

Each run is a fresh process in its own namespaces (users, mounts, network, processes, ipc, host name), as a user without
privileges, with an environment of three fixed variables and no open files but its pipes. It sees the interpreter,
`/usr/bin` and libraries, read-only, and a small `/tmp`, but no `/proc`, no home and no network device. It can make only
the system calls that are listed. Time, memory, processes, files and output are limited, and no process outlives the
run. Where any of this is impossible, the run is refused (UserError): there is no weaker way to run.

Whether an answer is correct is decided here, in the caller's process. Expected values are never sent into the sandbox:
inputs go in, plain built-in values come back over a separate pipe, and `same_value` compares them by exact type. An
exit code, printed text or an object that equals everything therefore has no influence.

The code shares its interpreter with the harness that calls it. By searching the harness's memory it can find the nonce
that marks records, and then write records itself, such as "call 3 returned 7". It gains nothing, because its function
could have returned 7. A record out of order invalidates the run. `run_tests` is different: there the tests are inside,
and code that tampers with them can claim that they passed. Compute rewards with `run_python` and calls, or with
`run_doctests`, whose expected output stays here.

Not guaranteed: that time is shared fairly between runs on a busy machine; that world-readable files below `/usr/lib`
and `/usr/bin` stay secret; protection from bugs of the kernel itself, or of the processor.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.sandbox import worker
from smallcoder_jax.sandbox.process import Ended, Limits, Sandbox, make_plan, python

FORGED = (ValueError, TypeError, RecursionError)  # raised on reading records that the harness would not have written
MAX_ARGUMENT = 128 << 10  # bytes; Linux's limit for one argument


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of the code by name, and its arguments: plain built-in values."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """The value that a call returned, or in `error` why there is none: its exception, a value that is not plain, or how
    the run ended."""

    value: Any = None
    error: str | None = None

    def is_value(self, expected: Any) -> bool:
        """Whether the call returned `expected`, with the same types and the same contents."""
        return self.error is None and same_value(self.value, expected)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run. Only `results` hold the values of calls; everything else is for people to read."""

    ended: Ended
    results: tuple[Result, ...]
    error: str | None  # the exception that prevented the code from loading, or that ended a script
    exit_code: int | None  # None after a signal
    stdout: str  # up to the limit; bytes that are not UTF-8 are replaced
    stderr: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Test:
    """The name of a test, and why it failed, or None if it passed."""

    name: str
    error: str | None


@dataclasses.dataclass(frozen=True)
class TestReport:
    """The tests that were run, in order, and the outcome of the run."""

    tests: tuple[Test, ...]
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether there were tests, all of them passed, and the run finished."""
        return bool(self.tests) and self.outcome.ended == "finished" and all(test.error is None for test in self.tests)


def same_value(one: Any, other: Any) -> bool:
    """Whether two plain values have the same types and the same contents: 1 is neither 1.0 nor True, and NaN equals
    NaN.

    Raises ValueError for a value that is not plain, or larger than a result may be.
    """
    return json.dumps(worker.encode(one)) == json.dumps(worker.encode(other))


def check_isolation() -> None:
    """Starts a sandbox and calls a function in it. Raises UserError that says what this machine lacks and what to
    do."""
    outcome = run_python("def answer(number):\n    return number + 1", calls=[Call("answer", (41,))])
    if not outcome.results[0].is_value(42):
        raise UserError(f"the sandbox starts here, but a function does not return in it: {outcome}")


def run_python(code: str, *, calls: Sequence[Call] = (), limits: Limits | None = None) -> Outcome:
    """Executes a module's code, then makes the calls in order. Without calls it is a script (`__name__` is `__main__`).

    `results` has one entry for each call, even where the code failed to load or the run ended before the call. Raises
    UserError where this machine cannot isolate programs, or an argument is not a plain value.
    """
    try:
        items = [[call.function, worker.encode(tuple(call.args)), worker.encode(dict(call.kwargs))] for call in calls]
    except ValueError as error:
        raise UserError(f"a call's arguments hold {error}; pass plain values, which can be copied inside") from None
    outcome = _run_job("calls" if items else "script", code, items, limits or Limits())
    missing = Result(error=f"not run: {outcome.error or outcome.ended}")
    results = outcome.results + (missing,) * (len(items) - len(outcome.results))
    return dataclasses.replace(outcome, results=results)


def run_doctests(code: str, text: str, *, limits: Limits | None = None) -> TestReport:
    """Loads the code, executes the examples (`>>>`) of `text` after it, and compares their output here.

    Only the sources of the examples are sent inside, so that the code can pass only by printing the right output.
    `text` is trusted. Its option flags are honoured, and `True` does not match `1`. Raises UserError for malformed
    examples, and where this machine cannot isolate programs.
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
    """Executes tests in the same process as the code: the TestCases and functions `test_*` of `tests`, or else its
    statements as one test.

    A process that ends early has not passed, whatever its exit code. But the verdict comes from inside, so that code
    that tampers with the tests or with unittest can forge it: use it to show results, not to compute rewards.
    """
    outcome = _run_job("tests", code, [tests], limits or Limits())
    found = tuple(Test(str(result.value), result.error) for result in outcome.results)
    if outcome.error is not None:
        found += (Test("<code>", outcome.error),)
    return TestReport(found, dataclasses.replace(outcome, results=()))


def run_command(script: str, *, files: Mapping[str, str] | None = None, limits: Limits | None = None) -> Outcome:
    """Runs a bash script in `/tmp` of a sandbox, which also holds `files` (relative path: text). `python` is this
    interpreter.

    Raises UserError where this machine cannot isolate programs, where a file's path leads out of the folder, and where
    the script or the files are too large.
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
    plan = make_plan(["/bin/bash", "-c", script], None, limits) | {"files": {n: t.hex() for n, t in given.items()}}
    run = Sandbox(plan, limits)
    return Outcome(_ended(run, limits) or "finished", (), None, run.exit_code, run.text(1), run.text(2), run.seconds)


def _run_job(kind: str, code: str, items: list[Any], limits: Limits) -> Outcome:
    """Runs the worker. `results` holds the results that came back, in order, or none if records were forged."""
    nonce = secrets.token_hex(16)
    job = json.dumps({"kind": kind, "nonce": nonce, "code": code, "items": items})
    argv = [python()[0], "-I", "-S", "-B", "-X", "utf8", "-c", Path(worker.__file__).read_text()]
    run = Sandbox(make_plan(argv, job, limits), limits)
    try:
        results, error, done = _read_records(bytes(run.received["records"]), nonce, kind, len(items))
        forged = False
    except FORGED:
        results, error, done, forged = [], None, False, True
    ended = _ended(run, limits) or ("forged" if forged else "finished" if done else "exited")
    return Outcome(ended, tuple(results), error, run.exit_code, run.text(1), run.text(2), run.seconds)


def _read_records(text: bytes, nonce: str, kind: str, count: int) -> tuple[list[Result], str | None, bool]:
    """The results, the error that prevented the code from loading, and whether the harness reached its end.

    Records are the lines that start with the nonce. Other lines were written by the code and are ignored. Raises one of
    `FORGED` for records that the harness would not have written for `count` items.
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
    return Result(worker.decode(value), error)


def _ended(run: Sandbox, limits: Limits) -> Ended | None:
    """What ended the program, or None if it ended by itself."""
    if run.reason is not None:
        return run.reason
    if run.signal is None:
        return None
    return "cpu" if run.signal == signal.SIGXCPU or run.cpu_s >= limits.cpu_s else "signal"
