"""Text of unknown origin as it may be shown: one function for each place.

What a model writes, what a file is called and what a row holds can carry terminal sequences, text that runs backwards
and markup. HTML is escaped by the templates themselves.
"""

from __future__ import annotations

_MARKUP = "\\|<>`*_[]#~&$"


def printable(text: str) -> str:
    """Text for a terminal: what is invisible or moves the cursor, but line ends and tabs, as its escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Text for one line of a terminal or a log: line ends and tabs are escapes too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """Text for one line or table cell of a Markdown page, with nothing in it that is markup."""
    return "".join("\\" + c if c in _MARKUP else c for c in one_line(" ".join(text.split())))
