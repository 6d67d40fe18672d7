"""The prose of this machine: the documentation of the installed packages.

Each page of documentation, each package's description and each module (its docstrings one after the other) is one
document. The standard library is excluded, because held-out code comes from its files, docstrings included.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from smallcoder_jax.base.files import read_regular
from smallcoder_jax.data.sources.decode import decode_source
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.licenses import package_licenses
from smallcoder_jax.data.sources.local import MAX_FILE_BYTES, walk_packages
from smallcoder_jax.data.sources.tree import File

_PAGES = (".md", ".rst")
_DESCRIPTION = "METADATA"
# Matches at the start of the file after comments, or after a colon that ends a line.
_DOCSTRING = re.compile(
    r"""(?:\A(?:\s|\#[^\n]*\n)*|:[ \t]*(?:\#[^\n]*)?\n\s*)[rRuU]?(?P<quote>\"{3}|'{3})(?P<text>.*?)(?P=quote)""",
    re.DOTALL,
)


def read_prose(source: str) -> Iterator[Document | Skipped]:
    """Every document of prose, in sorted order of the files. The top-level package is the repository."""
    licenses = package_licenses()
    for file in files_of_prose():
        relative = file.relative
        try:
            text = _prose_of(file.path)
        except (OSError, ValueError):
            yield Skipped("unreadable", relative)
            continue
        if text:
            package = relative.partition("/")[0].removesuffix(".py").partition("-")[0]
            yield Document(text, source, relative, package, "text", licenses.get(package, ""))


def files_of_prose() -> Iterator[File]:
    """The files of the installed packages that may hold prose."""
    for item in walk_packages():
        if isinstance(item, File) and (item.path.suffix in (".py", *_PAGES) or item.path.name == _DESCRIPTION):
            yield item


def _prose_of(path: Path) -> str:
    text = decode_source(read_regular(path, MAX_FILE_BYTES)).replace("\r\n", "\n")
    if path.suffix in _PAGES:
        return text
    if path.name == _DESCRIPTION:
        return text.partition("\n\n")[2]  # the text after the headers
    return docstrings(text)


def docstrings(code: str) -> str:
    """The docstrings of Python code that have several lines, separated by empty lines; empty where there are none.

    They are found as triple-quoted strings that begin a file or a block, because parsing every file would take minutes.
    """
    found = (inspect.cleandoc(match["text"]) for match in _DOCSTRING.finditer(code))
    return "\n\n".join(text for text in found if "\n" in text)
