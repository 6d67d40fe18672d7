"""The rules of `.gitignore` files, as git interprets them (gitignore(5)).

A path is matched against the rules of the nearest file first, and within a file against the last rule first. The first
rule that matches decides. The content of an ignored folder is never tested, so that no rule can include it again. As in
git, rules and names are compared byte by byte: each byte is one character here.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import os
import re
from collections.abc import Sequence

NAME = ".gitignore"
_CLASSES = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": " \\t",
    "cntrl": "\\x00-\\x1f\\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": "!-/:-@\\[-`{-~",
    "space": " \\t-\\r",
    "upper": "A-Z",
    "xdigit": "0-9a-fA-F",
}
_ANY = "**"  # as a whole segment: any number of folders


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a file. If it is `anchored`, `segments` match a path relative to the file's folder; otherwise the
    single segment matches the last name of any path."""

    segments: tuple[str, ...]
    anchored: bool
    folders_only: bool
    ignores: bool  # False for a line with `!`, which includes what an earlier line ignores

    def matches(self, parts: Sequence[str], is_folder: bool) -> bool:
        if self.folders_only and not is_folder:
            return False
        return _match_path(self.segments, parts) if self.anchored else _match_name(self.segments[0], parts[-1])


@dataclasses.dataclass(frozen=True)
class RuleFile:
    """The rules of one file, and how many folders below the root of the tree the file is."""

    depth: int
    rules: tuple[Rule, ...]

    def decides(self, parts: Sequence[str], is_folder: bool) -> bool | None:
        """Whether the last rule that matches a path ignores it; None where none matches."""
        parts = parts[self.depth :]
        return next((rule.ignores for rule in reversed(self.rules) if rule.matches(parts, is_folder)), None)


def is_ignored(files: Sequence[RuleFile], parts: Sequence[str], is_folder: bool) -> bool:
    """Whether a path is ignored. `parts` are its names from the root of the tree; `files` start with the nearest."""
    if not files:
        return False
    parts = [os.fsencode(part).decode("latin-1") for part in parts]
    decisions = (file.decides(parts, is_folder) for file in files)
    return next((decision for decision in decisions if decision is not None), False)


def parse_rules(content: bytes) -> tuple[Rule, ...]:
    """The rules of a file, in order. Lines that mean nothing to git are skipped."""
    text = content.removeprefix(codecs.BOM_UTF8).decode("latin-1")
    lines = (_parse_line(line) for line in text.split("\n"))
    return tuple(rule for rule in lines if rule is not None)


def _parse_line(line: str) -> Rule | None:
    if line.startswith("#"):
        return None
    pattern = line.removesuffix("\r")
    while pattern.endswith(" ") and not _is_escaped(pattern, len(pattern) - 1):
        pattern = pattern[:-1]
    ignores = not pattern.startswith("!")
    pattern = pattern.removeprefix("!")
    folders_only = pattern.endswith("/")
    pattern = pattern.removesuffix("/")
    if not pattern:
        return None
    anchored = "/" in pattern
    segments = pattern.removeprefix("/").split("/")
    if anchored:
        segments = [_ANY if re.fullmatch(r"\*{2,}", segment) else segment for segment in segments]
        if segments[-1] == _ANY:  # matches everything in a folder, but not the folder itself
            segments.append("*")
    return Rule(tuple(segments), anchored, folders_only, ignores)


def _is_escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _match_path(segments: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether segments match all names of a path. Where a match fails, the last `**` takes one more name. This finds
    every match, in time proportional to the product of both lengths."""
    segment = part = 0
    retry: tuple[int, int] | None = None
    while part < len(parts):
        if segment < len(segments) and segments[segment] == _ANY:
            segment += 1
            retry = (segment, part)
        elif segment < len(segments) and _match_name(segments[segment], parts[part]):
            segment, part = segment + 1, part + 1
        elif retry:
            segment, part = retry[0], retry[1] + 1
            retry = (segment, part)
        else:
            return False
    return all(left == _ANY for left in segments[segment:])


def _match_name(segment: str, name: str) -> bool:
    pattern = _compile(segment)
    return pattern is not None and pattern.fullmatch(name) is not None


@functools.lru_cache(4096)
def _compile(segment: str) -> re.Pattern[str] | None:
    """The pattern of one segment; None for a segment that matches nothing because a `[` or an escape is incomplete.

    The text between two stars is matched once, at its first occurrence, in an atomic group. With backtracking to later
    occurrences a line with many stars would take years.
    """
    between: list[list[str]] = [[]]
    at = 0
    while at < len(segment):
        character = segment[at]
        at += 1
        if character == "*":
            between.append([])
        elif character == "?":
            between[-1].append(".")
        elif character == "[":
            found = _character_class(segment, at)
            if found is None:
                return None
            expression, at = found
            between[-1].append(expression)
        else:
            if character == "\\":
                if at == len(segment):
                    return None
                character, at = segment[at], at + 1
            between[-1].append(re.escape(character))
    first, *others = ("".join(part) for part in between)
    if not others:
        return re.compile(first, re.DOTALL)
    middle = "".join(f"(?>.*?{part})" for part in others[:-1])
    return re.compile(f"{first}{middle}.*{others[-1]}", re.DOTALL)


def _character_class(segment: str, at: int) -> tuple[str, int] | None:
    """The regular expression for the class whose `[` precedes `at`, and the index after its end; None where it does not
    end."""
    negated = segment[at : at + 1] in ("!", "^")
    at += negated
    start, items = at, []
    while at < len(segment):
        if segment[at] == "]" and at > start:
            return f"[{'^' if negated else ''}{''.join(items)}]", at + 1
        if segment.startswith("[:", at):
            name, end, _ = segment[at + 2 :].partition(":]")
            if not end or name not in _CLASSES:
                return None
            items.append(_CLASSES[name])
            at += len(name) + 4
            continue
        low, at = _class_member(segment, at)
        high = low
        if segment.startswith("-", at) and at + 1 < len(segment) and segment[at + 1] != "]":
            high, at = _class_member(segment, at + 1)
        if low is None or high is None:
            return None
        items.append(re.escape(low) + (f"-{re.escape(high)}" if low < high else ""))  # git treats `z-a` as a z
    return None


def _class_member(segment: str, at: int) -> tuple[str | None, int]:
    if segment[at] != "\\":
        return segment[at], at + 1
    return (segment[at + 1], at + 2) if at + 1 < len(segment) else (None, at + 1)
