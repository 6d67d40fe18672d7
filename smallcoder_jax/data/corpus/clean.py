"""Filters that decide which documents are dropped from the training data, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator

from smallcoder_jax.data.sources.document import Document
from smallcoder_jax.data.sources.languages import CODE

REASONS = ("short", "binary", "minified", "generated", "vendored")
# The limits of The Stack (arXiv 2211.15533, section 3) for code that people wrote.
MAX_LINE, MAX_MEAN_LINE = 1000, 100
MIN_SPACE_IN_PROSE = 0.1  # text has a space every six characters; minified code and data have few
_VENDOR_FOLDERS = frozenset(
    {"vendor", "_vendor", "vendored", "_vendored", "node_modules", "bower_components", "third_party", "thirdparty"}
    | {"site-packages", "dist-packages"}
)
_HEAD_CHARACTERS = 1000
# The beginnings of comments: those up to the end of the line, and those with their own end mark.
_LINE_COMMENT = re.compile(r"\s*(?:#|//|--|;|%|\*|rem\b)", re.IGNORECASE)
_BLOCK_COMMENT = re.compile(r"\s*(?:/\*|<!--|\(\*|\{-|[rR]?\"\"\"|[rR]?''')")
_BLOCK_ENDS = {"/*": "*/", "<!--": "-->", "(*": "*)", "{-": "-}", '"""': '"""', "'''": "'''"}
_DECORATION = " \t#/*-;%<!=+~:(){}|\"'_"
_PRAGMA = re.compile(r"[\w-]+(?::\s*[\w-]+)*")  # pylint: skip-file
_THING = (
    r"(?:(?:source|header|python|interface|configuration|config|resource|migration|output|test)\s+)?"
    r"(?:file|code|module|script|source|header|class|document|package|page|program|stub|sources|contents?)"
)
_GENERATED = r"(?:(?:auto|machine|computer)[- ]?|(?:automatically|programmatically|mechanically)[- ])?@?generated"
_SOURCE = r"(?:by|from|with|using|via|automatically|(?:on|at)\W+\w*\W*\d)\b"
_END = r"\s*(?:[.,;:!()\[-]|$|and\b|please\b|do not\b|don't\b)"
# Statements that this very file is generated. A sentence about other things that are generated, or about what one must
# not edit, is not enough.
_THIS_IS_GENERATED = re.compile(
    rf"\bthis\s+(?:\w+\s+){{0,2}}?{_THING}\s+(?:is|was|has been|were|are)\s+(?:an?\s+)?(?:\w+ly\s+)?{_GENERATED}\b"
    rf"|\bthis is an?\s+{_GENERATED}\s+{_THING}\b"
    rf"|\bdo not (?:edit|modify|change)(?:\s+(?:directly|manually|by hand|this file))?\s*[-:;,.!(]+\s*"
    rf"(?:(?:this|it) is )?(?:an? )?{_GENERATED}\b"
    rf"|\b(?:changes|modifications|edits)\b.{{0,30}}\bthis file\b.{{0,20}}\b(?:lost|overwritten)\b",
    re.IGNORECASE,
)
# The same at the beginning of a line that does not continue the sentence of the line before.
_LINE_SAYS = re.compile(
    rf"(?:{_THING}\s+)?{_GENERATED}(?:\s+{_THING})?(?:\s+{_SOURCE}|{_END})"
    rf"|auto-generated>|@generated\b"
    rf"|(?:please\s+)?do not (?:hand[- ]?)?(?:edit|modify|change)\s+this\s+(?:generated\s+)?file\b"
    rf"|(?:python\s+)?(?:character mapping\s+)?codec\s+(?:\S+\s+)?generated\s+from\b"
    rf"|form implementation generated from\b"
    rf"|a bison parser, made by",
    re.IGNORECASE,
)


def drop_reason(document: Document, min_characters: int) -> str | None:
    """The first of `REASONS` to drop a document, or None if it is kept."""
    text = document.text
    if len(text.strip()) < min_characters:
        return "short"
    if "\0" in text:
        return "binary"
    if not _VENDOR_FOLDERS.isdisjoint(document.path.lower().split("/")[:-1]):
        return "vendored"
    if _is_minified(document):
        return "minified"
    if document.language.lower() in CODE and _says_generated(text[:_HEAD_CHARACTERS]):
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


def _says_generated(head: str) -> bool:
    """Whether a comment at the head of a file says that the file is generated."""
    before = ""  # the text of the comment line before this one
    for line in _comment_lines(head):
        text = line.strip(_DECORATION)
        goes_on = (before[-1:].isalnum() or before.endswith(",")) and not _PRAGMA.fullmatch(before)
        if _THIS_IS_GENERATED.search(text):
            return True
        if not (goes_on and text[:1].islower()) and _LINE_SAYS.match(text):
            return True
        before = text
    return False


def _comment_lines(head: str) -> Iterator[str]:
    """The lines that are comments, and an empty line for each that is not."""
    end = ""  # the end mark of the block comment that the line is in
    for line in head.splitlines():
        begin = _BLOCK_COMMENT.match(line) if not end else None
        if begin:
            mark = begin[0].strip().lstrip("rR")
            end = "" if _BLOCK_ENDS[mark] in line[begin.end() :] else _BLOCK_ENDS[mark]
            yield line
        elif end:
            yield line
            end = "" if end in line else end
        else:
            yield line if _LINE_COMMENT.match(line) else ""
