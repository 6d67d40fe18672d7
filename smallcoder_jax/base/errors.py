"""Errors that a user can act on, and the exit codes of every command.

An error message holds three things: what was given, what was expected, what to do about it.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable

from smallcoder_jax.base.display import say

EXIT_USER_ERROR = 2  # bad input: config, path, data, tokenizer, workdir of another run
EXIT_CHECK_FAILED = 3  # a check that the command promises did not hold (parity, verification, validation)
EXIT_DIVERGED = 4  # too many updates in a row were skipped: loss or gradient not finite, or a spike
EXIT_STALLED = 5  # a wait took too long; the stacks of all threads were written
EXIT_INTERRUPTED = 75  # SIGTERM or SIGINT: the progress is saved, and the same command continues from there
EXIT_NO_READER = 141  # the output goes into a pipe whose reader has ended, such as head
NOT_TRIED_AGAIN = (EXIT_USER_ERROR, EXIT_CHECK_FAILED, EXIT_DIVERGED)  # the same command would fail the same way


class UserError(Exception):
    """A mistake in what the user gave. Printed as one message, without a traceback, with exit code 2."""


class NotFinite(UserError):
    """A model computes scores that are not finite numbers."""


class CheckFailed(Exception):
    """A promised check did not hold. Printed as one message, without a traceback, with exit code 3."""


class Diverged(Exception):
    """Training went wrong and was stopped. Printed as one message, without a traceback, with exit code 4."""


class Interrupted(Exception):
    """SIGTERM came before there was anything to save. Printed as one message, with exit code 75."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command's `main`, turns the errors above into a message and an exit code, and exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    try:
        code = main() or 0
        sys.stdout.flush()  # here, where a broken pipe is handled, not when the interpreter exits
    except BrokenPipeError:
        # Ends like a program that SIGPIPE kills. The interpreter flushes once more at exit: discard what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_NO_READER
    except (UserError, CheckFailed, Diverged, Interrupted, KeyboardInterrupt) as error:
        code = report(error)
    sys.exit(code)


def report(error: BaseException) -> int:
    """Prints the error that ended a command and returns the exit code. It is one message where a user can act on it,
    and a traceback otherwise."""
    if isinstance(error, UserError):
        say(f"error: {error}", sys.stderr)
        return EXIT_USER_ERROR
    if isinstance(error, CheckFailed):
        say(f"check failed: {error}", sys.stderr)
        return EXIT_CHECK_FAILED
    if isinstance(error, Diverged):
        say(f"error: {error}", sys.stderr)
        return EXIT_DIVERGED
    if isinstance(error, Interrupted):
        say(str(error), sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return 130
    traceback.print_exception(error)
    return 1
