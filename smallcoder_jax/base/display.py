"""Makes text of unknown origin safe to show: one function for each place where it is shown.

The output of a model, a file name or a row of data can contain terminal sequences, right-to-left overrides and markup.
The HTML templates pass the text that they show through here and escape HTML themselves.
"""

from __future__ import annotations

import sys
from typing import TextIO

_MARKUP = "\\|<>`*_[]#~&$"


def printable(text: str) -> str:
    """Text for a terminal: characters that are invisible or move the cursor, except line ends and tabs, are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def say(text: str = "", file: TextIO | None = None) -> None:
    """Prints text of any origin and flushes. Every command uses it instead of `print`. By default to standard
    output."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def show(text: str, stream: TextIO) -> None:
    """Writes the text that a command was asked to produce, and flushes: escaped by `printable` on a terminal, unchanged
    into a file or a pipe."""
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def one_line(text: str) -> str:
    """Text for one line of a terminal or a log: as `printable`, with line ends and tabs escaped too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def code(text: str) -> str:
    """Text for a code span of a Markdown page, between two backticks."""
    return one_line(text).replace("`", "'")


def markdown(text: str) -> str:
    """Text for one line or table cell of a Markdown page, with all markup escaped."""
    return "".join("\\" + c if c in _MARKUP else c for c in one_line(" ".join(text.split())))
