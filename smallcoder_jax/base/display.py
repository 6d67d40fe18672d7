"""Text of unknown origin as it may be shown: one function for each place.

What a model writes, what a file is called and what a row holds can carry terminal sequences, text that runs backwards
and markup. The templates pass what they show through here, and escape HTML themselves.
"""

from __future__ import annotations

import sys
from typing import TextIO

_MARKUP = "\\|<>`*_[]#~&$"


def printable(text: str) -> str:
    """Text for a terminal: what is invisible or moves the cursor, but line ends and tabs, as its escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def say(text: str = "", file: TextIO | None = None) -> None:
    """Prints text of any origin, at once; what every command has instead of `print`. `file`: standard output."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def show(text: str, stream: TextIO) -> None:
    """Writes what is asked for itself, at once: `printable` on a terminal, exactly as it is into a file or a pipe."""
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def one_line(text: str) -> str:
    """Text for one line of a terminal or a log: line ends and tabs are escapes too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def code(text: str) -> str:
    """Text for a code span of a Markdown page, between two backticks."""
    return one_line(text).replace("`", "'")


def markdown(text: str) -> str:
    """Text for one line or table cell of a Markdown page, with nothing in it that is markup."""
    return "".join("\\" + c if c in _MARKUP else c for c in one_line(" ".join(text.split())))
