"""The prose of this machine: what the installed packages say about themselves.

One document for each page of documentation, for each package's description, and for each module: its docstrings one
after the other. Not of the standard library: its files are what code is held out from, docstrings included.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

from smallcoder_jax.data.documents import Document, Skipped
from smallcoder_jax.data.local import files_of_packages, package_licenses

_PAGES = (".md", ".rst")
_DESCRIPTION = "METADATA"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_prose(source: str) -> Iterator[Document | Skipped]:
    """Every such document, in sorted order of the files; the top-level package is the repository."""
    licenses = package_licenses()
    for root, path in files_of_packages():
        relative = path.relative_to(root).as_posix()
        if path.suffix not in (".py", *_PAGES) and path.name != _DESCRIPTION:
            continue
        try:
            text = _prose_of(path)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):  # files of other people
            yield Skipped("unreadable", relative)
            continue
        if text:
            package = relative.partition("/")[0].removesuffix(".py").partition("-")[0]
            yield Document(text, source, relative, package, "text", licenses.get(package, ""))


def _prose_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix in _PAGES:
        return text
    if path.name == _DESCRIPTION:
        return text.partition("\n\n")[2]  # behind the headers
    return docstrings(text)


def docstrings(code: str) -> str:
    """The docstrings of Python code in the order of the text, an empty line between two; empty where there are none."""
    if '"""' not in code and "'''" not in code:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(inspect.cleandoc(text) for text in found if text and "\n" in text.strip())
