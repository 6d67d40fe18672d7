"""What a source yields: documents with their provenance, and records of what was skipped."""

from __future__ import annotations

import dataclasses
import hashlib

SPLITS = ("train", "validation")  # the sides of documents, conversations and pairs: for training, and held out
# Documents may have a third side (`data.test_fraction`), which nothing sees before training has ended.
DOCUMENT_SPLITS = (*SPLITS, "test")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and its origin. A field that a source does not know is empty.

    `path` is a file's path within its source, or the id of a row. `repository` groups documents that must stay on one
    side of the split. `language` is in lower case.
    """

    text: str
    source: str
    path: str = ""
    repository: str = ""
    language: str = ""
    license: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the text, in hexadecimal, used for records and fingerprints."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256 of the `normalized` text, in hexadecimal, used for exact deduplication and the split."""
        return hashlib.sha256(normalized(self.text).encode("utf-8")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something in a source that is not a document, with the reason by which the accounting counts it."""

    reason: str
    path: str


def normalized(text: str) -> str:
    """A text without the differences that editors and systems introduce: without a byte order mark, `\\r` in line ends,
    and spaces and tabs at the end of a line, and with exactly one line end at its end."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if " \n" in text or "\t\n" in text:  # this check is fast, and false for almost all texts
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text.rstrip(" \t\n") + "\n"
