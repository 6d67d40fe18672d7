"""Decodes the bytes of a source file to text, by their encoding, and extracts the cells of a notebook."""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Mapping
from typing import Any

from smallcoder_jax.base.files import parse_json

# UTF-32 comes before UTF-16, because its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Matches in one of the first two lines a coding line of Python (PEP 263), Ruby or Emacs, or an XML declaration.
_DECLARED = re.compile(
    rb"\A(?:[^\n]*\n)??[ \t\f]*(?:(?:\#|[^\n]*?-\*-)[^\n]*?coding[:=][ \t]*|<\?xml[^\n>]*?encoding=[\"'])"
    rb"(?P<name>[-\w.]+)"
)
# Text encodings. Other codecs of Python do more than decode bytes: unicode_escape, idna, rot13.
_ENCODINGS = re.compile(r"ascii|utf-8|iso8859|iso2022|cp\d|koi8|mac|gb|big5|euc|shift|johab|hz|tis|ptcp|kz")
_LINE_COMMENTS = {
    **dict.fromkeys(("c", "c#", "c++", "f#", "go", "groovy", "java", "javascript", "kotlin", "rust"), "//"),
    **dict.fromkeys(("scala", "swift", "typescript"), "//"),
    **dict.fromkeys(("haskell", "lua", "sql"), "--"),
    **dict.fromkeys(("clojure", "lisp", "scheme"), ";;"),
    **dict.fromkeys(("matlab", "octave", "prolog"), "%"),
}


def decode_source(content: bytes) -> str:
    """The text of a file, without its byte order mark. The encoding is that of the mark (UTF-8, UTF-16, UTF-32), else
    the one that the file declares, else UTF-8. Raises ValueError where none of these fits."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding)
    declared = _DECLARED.match(content[:1000])
    if declared:
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode(_encoding(declared["name"].decode("ascii")))
    return content.decode("utf-8")


def _encoding(name: str) -> str:
    """The encoding that a declaration names; UTF-8, the most common one, where it names no text encoding."""
    try:
        found = codecs.lookup(name).name
    except LookupError:
        return "utf-8"
    return found if _ENCODINGS.match(found) and found != "utf-8-sig" else "utf-8"


def notebook_text(text: str) -> tuple[str, str]:
    """The cells of a Jupyter notebook without their outputs, as a script in the percent format (a line `# %%` begins a
    cell, and Markdown becomes comments), and the language of its code. Raises ValueError where it is no notebook."""
    notebook = parse_json(text, finite_only=False)
    if not isinstance(notebook, dict):
        raise ValueError("not a notebook")
    # Before format 4, cells were in worksheets, and their code was in `input`.
    sheets = notebook.get("worksheets") if "cells" not in notebook else [notebook]
    if not isinstance(sheets, list):
        raise ValueError("a notebook without cells")
    language = _language(notebook)
    comment = _LINE_COMMENTS.get(language, "#")
    cells = []
    for cell in (cell for sheet in sheets for cell in _list(_get(sheet, "cells"))):
        source = _get(cell, "source", _get(cell, "input", ""))
        lines = ("".join(map(str, source)) if isinstance(source, list) else str(source)).strip("\n").split("\n")
        kind = _get(cell, "cell_type")
        if lines == [""] or kind == "raw":
            continue
        if kind == "code":
            cells.append("\n".join([f"{comment} %%", *lines]))
        else:
            cells.append("\n".join([f"{comment} %% [markdown]", *(f"{comment} {line}".rstrip() for line in lines)]))
    script = "\n\n".join(cells) + "\n" * bool(cells)
    script.encode("utf-8")  # raises for half a surrogate pair, which JSON permits but a text does not
    return script, language


def _language(notebook: Mapping[str, Any]) -> str:
    metadata = _get(notebook, "metadata")
    name = _get(_get(metadata, "language_info"), "name") or _get(_get(metadata, "kernelspec"), "language")
    return name.lower() if isinstance(name, str) and name.lower() != "ipython" else "python"


def _get(value: Any, key: str, default: Any = None) -> Any:
    return value.get(key, default) if isinstance(value, Mapping) else default


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
