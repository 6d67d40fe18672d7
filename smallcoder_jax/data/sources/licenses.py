"""The licences of installed packages and of the repositories of a tree, for provenance only."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path

from smallcoder_jax.base.files import read_regular
from smallcoder_jax.data.sources.languages import language_of

_FILE = re.compile(r"(?:(?:un)?licen[cs]e|copying)(?:[-.](?:\w|[+-]|\.\d)+)??(?:\.(?:txt|md|rst))?", re.IGNORECASE)
_MAX_BYTES = 1 << 20
_SHOWN = 100  # characters of an unknown licence text that are shown


@dataclasses.dataclass(frozen=True)
class _Known:
    """A licence, recognised by phrases of its text. The text has at most `words` words; a longer text adds to it."""

    id: str
    words: int
    phrases: tuple[str, ...]


_GRANT = "permission is hereby granted free of charge to any person obtaining a copy of this software"
_NOTICE = "the above copyright notice and this permission notice shall be included in all copies"
_BSD = "redistribution and use in source and binary forms with or without modification are permitted provided that"
_BSD_BINARY = "redistributions in binary form must reproduce the above copyright notice"
_ISC = "permission to use copy modify and or distribute this software for any purpose with or without fee is hereby"
_GNU = "gnu {}general public license version {}"
_KNOWN = (
    _Known("MIT", 200, (_GRANT, _NOTICE, "the software is provided as is")),
    _Known("MIT-0", 180, (_GRANT, "the software is provided as is")),
    _Known("BSD-3-Clause", 270, (_BSD, _BSD_BINARY, "endorse or promote products")),
    _Known("BSD-2-Clause", 220, (_BSD, _BSD_BINARY)),
    _Known("ISC", 150, (_ISC, "provided that the above copyright notice and this permission notice appear")),
    _Known("0BSD", 130, (_ISC, "the software is provided as is")),
    _Known("Apache-2.0", 1800, ("apache license version 2 0 january 2004", "grant of patent license")),
    _Known("MPL-2.0", 2700, ("mozilla public license version 2 0", "covered software")),
    _Known("AGPL-3.0", 6000, (_GNU.format("affero ", "3 19 november 2007"), "remote network interaction")),
    _Known("GPL-3.0", 6000, (_GNU.format("", "3 29 june 2007"), "conveying modified source versions")),
    _Known("GPL-2.0", 3300, (_GNU.format("", "2 june 1991"), "this license applies to any program")),
    _Known("LGPL-3.0", 1400, (_GNU.format("lesser ", "3 29 june 2007"), "exception to section 3 of the gnu gpl")),
    _Known("LGPL-2.1", 4600, (_GNU.format("lesser ", "2 1 february 1999"), "work that uses the library")),
    _Known("Unlicense", 250, ("this is free and unencumbered software released into the public domain",)),
    _Known("CC0-1.0", 1200, ("cc0 1 0 universal", "affirmer hereby overtly fully permanently irrevocably")),
)


def package_licenses() -> dict[str, str]:
    """The licence of each top-level package according to its metadata; empty where the metadata names none."""
    licenses = {}
    for package, distributions in importlib.metadata.packages_distributions().items():
        metadata = importlib.metadata.metadata(distributions[0])
        named = metadata.get_all("License-Expression") or [
            line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
        ]
        # The free-text field is the last choice, because some packages put the whole licence there.
        named = named or [line.strip().partition("\n")[0][:_SHOWN] for line in metadata.get_all("License") or []]
        licenses[package] = ", ".join(named)
    return licenses


def is_license_file(name: str) -> bool:
    """Whether the name of a file is that of a repository's licence file: LICENSE, LICENCE.txt, COPYING, ..."""
    return _FILE.fullmatch(name) is not None and language_of(name) in (None, "text", "markdown", "restructuredtext")


def license_of_files(paths: list[Path]) -> str:
    """The licences in these files, sorted: the SPDX identifier of a well-known text, else its first line. Unreadable
    files are skipped."""
    found = set()
    for path in paths:
        try:
            text = read_regular(path, _MAX_BYTES).decode("utf-8-sig", "replace")
        except OSError:
            continue
        found.add(license_of(text))
    return ", ".join(sorted(found - {""}))


def license_of(text: str) -> str:
    """The SPDX identifier of a licence's text where it is certain, else the first line that is not empty."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    joined = " ".join(words)
    for known in _KNOWN:
        if len(words) <= known.words and all(phrase in joined for phrase in known.phrases):
            return known.id
    first = next((line.strip(" \t#=*-/") for line in text.splitlines() if line.strip(" \t#=*-/")), "")
    return first[:_SHOWN]
