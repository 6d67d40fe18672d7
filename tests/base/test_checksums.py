"""Whether a file is still the one that was recorded."""

import os
from pathlib import Path

import pytest

from smallcoder_jax.base.checksums import check_file, checksum, checksums_of, is_checksum
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import NotAFile


def test_a_checksum_is_size_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    expected = {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert checksum(path) == expected
    assert checksum(path, expected) == expected
    assert checksums_of(tmp_path, ["a"]) == {"a": expected}
    assert is_checksum(expected)
    for odd in (None, [], {}, {"bytes": True, "sha256": ""}, {"bytes": 3}, {"bytes": 3, "sha256": None}):
        assert not is_checksum(odd)


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    assert checksum(path, {"bytes": 3, "sha256": "x"}) == {"bytes": 1 << 42, "sha256": None}
    assert checksum(path, "nothing that was recorded")["sha256"] is None
    with pytest.raises(UserError, match=r"since the export: 4,398,046,511,104 bytes, not 3 bytes with .* Again"):
        check_file(path, {"bytes": 3, "sha256": "x"}, "the export", "Again.")


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(NotAFile):
        checksum(path)
    for odd, reason in ((path, "it is a pipe"), (tmp_path, "it is a folder"), (tmp_path / "no", "No such file")):
        with pytest.raises(UserError, match=rf"cannot be read: {reason}.*; it was there at the export. Again"):
            check_file(odd, {"bytes": 0, "sha256": ""}, "the export", "Again.")
    with pytest.raises(UserError, match="cannot be read"):
        check_file(Path("a\0b"), {"bytes": 0, "sha256": ""}, "the export", "Again.")
