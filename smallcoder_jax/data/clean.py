"""Filters: which documents are not worth learning from, and why."""

from __future__ import annotations

import re

from smallcoder_jax.data.documents import Document
from smallcoder_jax.data.languages import CODE

REASONS = ("short", "binary", "minified", "generated", "vendored")
# The limits of The Stack (arXiv 2211.15533, section 3) for code that people wrote.
MAX_LINE, MAX_MEAN_LINE = 1000, 100
MIN_SPACE_IN_PROSE = 0.1  # text has a space every six characters; minified code and data have few
_VENDOR_FOLDERS = frozenset(
    {"vendor", "_vendor", "vendored", "_vendored", "node_modules", "bower_components", "third_party", "thirdparty"}
    | {"site-packages", "dist-packages"}
)
_HEAD_CHARACTERS = 1000
_GENERATED = re.compile(
    r"^\s*(?:#|//|/\*|\*|--|;|<!--|%|\"\"\"|''').*"
    r"(?:auto(?:matically)?[- ]?generated|\bgenerated (?:by|from|with|using)\b|@generated|"
    r"\bdo not (?:edit|modify)\b|\bdon't edit\b)",
    re.IGNORECASE | re.MULTILINE,
)


def drop_reason(document: Document, min_characters: int) -> str | None:
    """The first of `REASONS` that holds against a document, or None: it is kept."""
    text = document.text
    if len(text.strip()) < min_characters:
        return "short"
    if "\0" in text:
        return "binary"
    if not _VENDOR_FOLDERS.isdisjoint(document.path.lower().split("/")[:-1]):
        return "vendored"
    if _is_minified(document):
        return "minified"
    if document.language.lower() in CODE and _GENERATED.search(text[:_HEAD_CHARACTERS]):
        return "generated"
    return None


def _is_minified(document: Document) -> bool:
    lines = document.text.splitlines() or [""]
    longest = max(map(len, lines))
    if longest <= MAX_LINE and len(document.text) / len(lines) <= MAX_MEAN_LINE:
        return False
    if document.language.lower() in CODE:
        return True
    return sum(map(str.isspace, document.text)) < MIN_SPACE_IN_PROSE * len(document.text)
