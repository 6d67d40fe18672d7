"""The part of the sandbox that runs inside, in the same interpreter as the code that it calls; and the wire format.

The launcher runs this file's text with `python -c` and two descriptors: 3 holds the job (JSON), and 4 takes records,
one per line, each after the job's nonce. This file imports the standard library only.

Values are transferred as JSON lists that begin with a tag, so that reading them executes nothing and every type is
exact: a subclass of int or str, which could claim to equal anything, is not a plain value and is rejected.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

MAX_DEPTH = 50  # of lists in lists
MAX_ITEMS = 100_000  # in one value, all levels together
MAX_INT_BITS = 14_000  # below the 4300 digits at which Python refuses to print an int
MAX_SAME_HASH = 64  # keys of one set or dict; more occur only in values made to keep the reader busy
MAX_ERROR = 2000  # characters of an exception's text
JOB_FD, RECORD_FD = 3, 4


def encode(value: Any) -> Any:
    """A plain built-in value as JSON data. Sets and dicts are sorted, so that equal values give equal text.

    Raises ValueError for a value that is not plain, is nested too deep, is too large, or contains itself.
    """
    return _encode(value, MAX_DEPTH, [MAX_ITEMS])


def _encode(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"a value of more than {MAX_ITEMS} items")
    if depth < 0:
        raise ValueError(f"a value nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        if value.bit_length() > MAX_INT_BITS:
            raise ValueError(f"an int of {value.bit_length()} bits; {MAX_INT_BITS} at most")
        return ["int", hex(value)]
    if kind is float:
        return ["float", "nan" if value != value else (value + 0.0).hex()]  # -0.0 equals 0.0
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is list or kind is tuple:
        return [kind.__name__, *[_encode(item, depth - 1, left) for item in value]]
    if kind is set:
        return ["set", *sorted([_encode(item, depth - 1, left) for item in value], key=json.dumps)]
    if kind is dict:
        pairs = [[_encode(key, depth - 1, left), _encode(item, depth - 1, left)] for key, item in value.items()]
        return ["dict", *sorted(pairs, key=json.dumps)]
    raise ValueError(f"a {kind.__name__}, which is not a plain value (None, bool, int, float, str, bytes or a list, "
                     "tuple, dict or set of them)")  # fmt: skip


def decode(data: Any) -> Any:
    """The value that `encode` wrote. Raises ValueError for anything that `encode` would not have written exactly so."""
    try:
        value = _decode(data, MAX_DEPTH, [MAX_ITEMS])
    except OverflowError:
        raise ValueError("a float that is too large") from None
    if encode(value) != data:
        raise ValueError("not in the form in which values are written")
    return value


def _decode(data: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise ValueError("too many items or too deep")
    if data is None or type(data) in (bool, str):
        return data
    if type(data) is not list or not data or type(data[0]) is not str:
        raise ValueError("not a value")
    tag, *items = data
    if tag in ("int", "float", "bytes"):
        if len(items) != 1 or type(items[0]) is not str:
            raise ValueError(f"not a value of type {tag}")
        if tag == "int":
            if len(items[0]) > MAX_INT_BITS // 4 + 4:
                raise ValueError("an int that is too long")
            return int(items[0], 16)
        return float.fromhex(items[0]) if tag == "float" else bytes.fromhex(items[0])
    if tag in ("list", "tuple", "set"):
        values = [_decode(item, depth - 1, left) for item in items]
        if tag == "set":
            _check_keys(values)
        return {"list": list, "tuple": tuple, "set": set}[tag](values)
    if tag != "dict" or any(type(pair) is not list or len(pair) != 2 for pair in items):
        raise ValueError("not a value")
    keys = [_decode(pair[0], depth - 1, left) for pair in items]
    _check_keys(keys)
    return dict(zip(keys, [_decode(pair[1], depth - 1, left) for pair in items], strict=True))


def _check_keys(keys: list[Any]) -> None:
    """Raises ValueError for unhashable keys, and for too many keys with the same hash. Hashes of ints and tuples can be
    made to collide, and each colliding key is compared with all the others."""
    seen: dict[int, int] = {}
    for key in keys:
        try:
            number = hash(key)
        except TypeError:
            raise ValueError("a key that is not hashable") from None
        seen[number] = seen.get(number, 0) + 1
        if seen[number] > MAX_SAME_HASH:
            raise ValueError("too many keys of one hash")


def describe_error(error: BaseException) -> str:
    """`Type: message`, shortened; a fixed text where the exception cannot be printed."""
    try:
        return f"{type(error).__name__}: {error}"[:MAX_ERROR]
    except BaseException:
        return "an exception that cannot be printed"


class Harness:
    """Runs a job and writes its records.

    It looks up the functions that it uses before untrusted code runs, so that code that patches builtins or modules for
    its own reasons still delivers its results. This is no defence against code that searches for the nonce on purpose.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        write, dumps, head = os.write, json.dumps, f"\n{job['nonce']} "
        getpid, own = os.getpid, os.getpid()

        def record(*parts: Any) -> None:
            if getpid() != own:
                return  # in a process that the code forked and that returned here
            text = (head + dumps(parts) + "\n").encode()
            while text:
                text = text[write(RECORD_FD, text) :]

        self.record = record

    def run(self) -> None:
        """Loads the code, does what the job's kind requires, and records that it reached the end."""
        kind = self.job["kind"]
        module = types.ModuleType("__main__" if kind == "script" else "solution")
        sys.modules[module.__name__] = module
        try:
            exec(compile(self.job["code"], "<code>", "exec", dont_inherit=True), module.__dict__)
        except BaseException as error:
            self.record("failed", describe_error(error))
            if not isinstance(error, SystemExit):
                _print_traceback(error, self.job["code"])
            if kind == "script":  # a script exits as it would outside the sandbox
                raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None
            return
        if kind == "calls":
            for index, (name, args, kwargs) in enumerate(self.job["items"]):
                self.record("result", index, *self._call(module, name, decode(args), decode(kwargs)))
        elif kind == "doctests":
            for index, source in enumerate(self.job["items"]):
                self.record("result", index, *_run_example(module, source))
        elif kind == "tests":
            _run_tests(module, self.job["items"][0], self.record)
        self.record("end")

    @staticmethod
    def _call(module: types.ModuleType, name: str, args: Any, kwargs: Any) -> tuple[Any, str | None]:
        try:
            value = getattr(module, name)(*args, **kwargs)
        except BaseException as error:
            return None, describe_error(error)
        try:
            return encode(value), None
        except BaseException as error:
            return None, f"returned {describe_error(error).removeprefix('ValueError: ')}"


def _run_example(module: types.ModuleType, source: str) -> tuple[Any, str | None]:
    """The output of one doctest example and the last line of its traceback (or None), as an encoded pair; and no
    error."""
    import contextlib
    import io
    import traceback

    output, exception = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(source, "<doctest>", "single", dont_inherit=True), module.__dict__)
    except BaseException as error:
        exception = traceback.format_exception_only(error)[-1]
    return encode((output.getvalue(), exception)), None


def _run_tests(module: types.ModuleType, tests: str, record: Any) -> None:
    """Executes the tests in the code's module and records the result of each TestCase method and function `test_*`."""
    import unittest

    count = 0

    def report(name: str, error: str | None) -> None:
        nonlocal count
        record("result", count, encode(name[:MAX_ERROR]), error)
        count += 1

    class Reporter(unittest.TestResult):
        def addSuccess(self, test: unittest.TestCase) -> None:
            report(test.id(), None)

        def addError(self, test: unittest.TestCase, err: Any) -> None:
            report(test.id(), describe_error(err[1]))

        addFailure = addError

        def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
            if err is not None:
                report(subtest.id(), describe_error(err[1]))

        def addSkip(self, test: unittest.TestCase, reason: str) -> None:
            report(test.id(), f"skipped: {reason}"[:MAX_ERROR])

        def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
            report(test.id(), None)

        def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
            report(test.id(), "passed, although it is expected to fail")

    def attempt(name: str, run: Any) -> None:
        try:
            run()
        except BaseException as error:
            report(name, describe_error(error))
        else:
            report(name, None)

    before = dict(module.__dict__)
    try:
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        report("<tests>", describe_error(error))
        return
    new = {name: item for name, item in module.__dict__.items() if before.get(name) is not item}
    cases = [item for item in new.values() if isinstance(item, type) and issubclass(item, unittest.TestCase)]
    for case in cases:
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(Reporter())
    functions = {name: item for name, item in new.items() if name.startswith("test_") and callable(item)}
    for name, function in functions.items():
        attempt(name, function)
    if not cases and not functions:
        report("<tests>", None)  # plain statements, none of which failed


def _print_traceback(error: BaseException, code: str) -> None:
    """Prints the traceback as if the code had run as a program: with its source lines, which are in no file, and
    without the harness's frame."""
    import linecache
    import traceback

    linecache.cache["<code>"] = (len(code), None, code.splitlines(keepends=True), "<code>")
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    traceback.print_exception(error.with_traceback(inner))


def main() -> None:
    """Runs the job of `JOB_FD`. Except for scripts it exits at once, because threads of the code could prevent the
    end."""
    with open(JOB_FD, encoding="utf-8") as file:
        job = json.load(file)
    leave = os._exit
    Harness(job).run()
    if job["kind"] != "script":
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            leave(0)


if __name__ == "__main__":
    main()
