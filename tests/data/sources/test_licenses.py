"""The licences of repositories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smallcoder_jax.data.sources.licenses import is_license_file, license_of, license_of_files

MIT = """MIT License

Copyright (c) 2024 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction.

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.
"""
BSD_2 = """Copyright (c) 2024, Somebody

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice.
2. Redistributions in binary form must reproduce the above copyright notice.
"""
BSD_3 = BSD_2 + "3. Neither the name may be used to endorse or promote products derived from this software.\n"


def test_well_known_texts() -> None:
    assert license_of(MIT) == "MIT"
    assert license_of(MIT.replace("\n", "\r\n").upper()) == "MIT"
    assert license_of(BSD_2) == "BSD-2-Clause"
    assert license_of(BSD_3) == "BSD-3-Clause"
    root = Path(__file__).resolve().parents[3]
    assert license_of((root / "LICENSE").read_text()) == "Apache-2.0"


def test_other_texts_are_their_first_line() -> None:
    more = " ".join(["The licence does not grant you the right to sell the software."] * 12)
    assert license_of(MIT + more) == "MIT License"  # conditions were added: it is another licence
    assert license_of("\n\n  ===\n# Our own licence\n\nAll rights reserved.\n") == "Our own licence"
    assert license_of("x" * 1000) == "x" * 100
    assert license_of("") == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LICENSE", True),
        ("LICENCE.md", True),
        ("license.txt", True),
        ("COPYING", True),
        ("COPYING.LESSER", True),
        ("UNLICENSE", True),
        ("LICENSE-MIT", True),
        ("LICENSE-APACHE-2.0.txt", True),
        ("license.py", False),
        ("license-checker.js", False),
        ("LICENSES", False),
        ("copying_files.md", False),
    ],
)
def test_names(name: str, expected: bool) -> None:
    assert is_license_file(name) is expected


def test_files(tmp_path: Path) -> None:
    (tmp_path / "LICENSE-MIT").write_text(MIT)
    (tmp_path / "LICENSE-OWN").write_bytes(b"\xef\xbb\xbfOwn \xff licence\n")
    os.mkfifo(tmp_path / "COPYING")
    paths = [tmp_path / name for name in ("LICENSE-OWN", "LICENSE-MIT", "COPYING", "gone")]
    assert license_of_files(paths) == "MIT, Own \ufffd licence"
