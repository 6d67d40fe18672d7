"""Errors that a user can act on, and the exit codes of every command.

An error message holds three things: what was given, what was expected, what to do about it.
"""

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2  # bad input: config, path, data, tokenizer, workdir of another run
EXIT_CHECK_FAILED = 3  # a check that the command promises did not hold (parity, verification, validation)
EXIT_DIVERGED = 4  # too many updates in a row were skipped: loss or gradient not finite, or a spike
EXIT_STALLED = 5  # a wait took too long; the stacks of all threads were written
EXIT_INTERRUPTED = 75  # SIGTERM or SIGINT: what there was is saved, the same command continues


class UserError(Exception):
    """A mistake in what the user gave. Printed as one message, without a traceback, with exit code 2."""


class CheckFailed(Exception):
    """A promised check did not hold. Printed as one message, without a traceback, with exit code 3."""


class Diverged(Exception):
    """Training went wrong and was stopped. Printed as one message, without a traceback, with exit code 4."""


class Interrupted(Exception):
    """SIGTERM came before there was anything to save. Printed as one message, with exit code 75."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command's `main`, turns the errors above into a message and an exit code, and exits."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except CheckFailed as error:
        print(f"check failed: {error}", file=sys.stderr)
        code = EXIT_CHECK_FAILED
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_DIVERGED
    except Interrupted as error:
        print(error, file=sys.stderr)
        code = EXIT_INTERRUPTED
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
