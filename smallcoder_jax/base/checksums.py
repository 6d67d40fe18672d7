"""Checksums of files: whether a file still has the size and the SHA-256 that were recorded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import open_regular, reason


def checksum(path: Path, recorded: Any = None) -> dict[str, Any]:
    """The size (`bytes`) and the `sha256` of a file. Where a `recorded` checksum has another size, the file is not read
    and its `sha256` is None, so that a file that has grown enormously costs no hours. Raises OSError, and ValueError
    for a path with a zero byte."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        read = recorded is None or (isinstance(recorded, Mapping) and recorded.get("bytes") == size)
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest() if read else None}


def is_checksum(value: Any) -> bool:
    """Whether `value`, from a JSON file, has the form of a checksum."""
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def checksums_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The checksums of the files `names` of `folder`, by name. Raises OSError."""
    return {name: checksum(folder / name) for name in names}


def check_file(path: Path, recorded: Mapping[str, Any], since: str, again: str) -> None:
    """Raises UserError where the file `path` does not have the `recorded` checksum. For the message, `since` says when
    it was recorded, such as "the export", and `again` what to do."""
    try:
        found = checksum(path, recorded)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; it was there at {since}. {again}") from error
    if found != recorded:
        raise UserError(
            f"{path} is damaged or was changed since {since}: {_shown(found)}, not {_shown(recorded)}. {again}"
        )


def _shown(value: Mapping[str, Any]) -> str:
    digest = value["sha256"]
    return f"{value['bytes']:,} bytes" + ("" if digest is None else f" with the SHA-256 {digest[:12]}...")
