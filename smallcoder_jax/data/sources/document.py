"""What a source yields: documents with their provenance, and what was passed over."""

from __future__ import annotations

import dataclasses
import hashlib

SPLITS = ("train", "validation")  # of documents, conversations and pairs: what is learned from, what is held out


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and where it comes from. A field that a source does not know is empty.

    `path` is a file's path within its source, or the id of a row; `repository` groups documents that must stay on
    one side of the split; `language` is in lower case.
    """

    text: str
    source: str
    path: str = ""
    repository: str = ""
    language: str = ""
    license: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the text, in hexadecimal: what records and fingerprints go by."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256 of the text as `normalized`, in hexadecimal: what exact deduplication and the split go by."""
        return hashlib.sha256(normalized(self.text).encode("utf-8")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that a source holds and that is no document, with the reason that the accounting counts."""

    reason: str
    path: str


def normalized(text: str) -> str:
    """A text without what editors and systems change in it: a byte order mark, `\\r` in line ends, spaces and tabs at
    the end of a line, and more or less than one line end at the end."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if " \n" in text or "\t\n" in text:  # by far most texts have none, and this is fast
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text.rstrip(" \t\n") + "\n"
