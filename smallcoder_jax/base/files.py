"""The one place that reads files of unknown origin, and that writes files so that no reader sees a part of one.

Every file that a user, a download or a copy may have left in a folder is opened here. Opening never waits for a FIFO, a
device or a socket, the size is checked before the content is read, and any JSON text yields a value or a ValueError.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError

MAX_RECORD_BYTES = 64 << 20  # of files that are read whole and are no corpus: JSON files, tokenizers, prompts
MAX_DEPTH = 100  # of nested brackets in JSON; the files of this package have fewer than ten
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotAFile(OSError):
    """The path leads to something other than a regular file; `strerror` says to what."""


class TooLarge(OSError):
    """The file is larger than the limit of the reader; `strerror` states the limit."""


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading. Raises OSError; NotAFile for a folder, pipe or device."""
    _check_regular(path, os.stat(path).st_mode)  # before it is opened, because opening a device can have effects
    # Without O_NONBLOCK, opening would wait if a pipe took the file's place at this moment.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError; TooLarge, before reading, where the
    file's size is above the limit."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = bytearray()
        # A file that is growing, and a file of /proc, hold more than their size says.
        while size <= limit and len(content) <= limit and (part := file.read(max(size + 1 - len(content), 1 << 16))):
            content += part
        if size > limit or len(content) > limit:
            raise TooLarge(None, f"larger than {limit:,} bytes", str(path))
        return bytes(content)


def sha256(path: Path) -> str:
    """The SHA-256 of a regular file of any size, in hexadecimal. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, what: str, limit: int = MAX_RECORD_BYTES) -> bytes:
    """The content of a file. Raises UserError where it cannot be read; `what` says what was expected in it."""
    try:
        return read_regular(path, limit)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(f"{path} cannot be read ({reason(error)}); expected {what}") from error


def read_text(path: Path, what: str, limit: int = MAX_RECORD_BYTES) -> str:
    """The text of a UTF-8 file without its byte order mark, with line ends unchanged. Raises UserError."""
    try:
        return read_bytes(path, what, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start:,}); expected {what}") from error


def read_json(path: Path, what: str, limit: int = MAX_RECORD_BYTES) -> Any:
    """The value in a JSON file. Raises UserError where it is missing or damaged; `what` says what was expected."""
    text = read_text(path, what, limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); expected {what}") from error


def read_json_object(path: Path, what: str, limit: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where the file is missing, damaged or holds another kind of value."""
    content = read_json(path, what, limit)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a JSON object; expected {what}")
    return content


def parse_json(text: str | bytes, *, finite_only: bool = True, unique_keys: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError, and nothing else, for invalid JSON and for brackets nested deeper
    than MAX_DEPTH; with `finite_only` also for NaN, infinities and numbers beyond float64; with `unique_keys` also for
    a key that an object holds twice."""
    hooks: dict[str, Any] = {"object_pairs_hook": _without_doubles} if unique_keys else {}
    if finite_only:
        hooks |= {"parse_constant": _refuse_constant, "parse_float": _finite_float}
    try:
        value = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("brackets nested too deep") from error
    check_depth(value)
    return value


def check_depth(value: Any, most: int = MAX_DEPTH) -> None:
    """Raises ValueError for objects and lists that are nested more than `most` levels deep."""
    level, depth = [value], 0
    while level:
        if depth > most:
            raise ValueError(f"brackets nested deeper than {most}")
        level = [item for outer in level for item in _items(outer)]
        depth += 1


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that a reader sees the old file or the new one, never a part. Non-finite floats become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # half a surrogate pair is valid JSON only as an escape


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a temporary file next to `path`, syncs it and renames it. Creates the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f".{path.name}.partial")
    with neighbour.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    neighbour.replace(path)


def finite(value: Any) -> Any:
    """`value` in plain JSON types: NaN and infinities, which JSON lacks, become None; paths and other objects, text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return finite(value.tolist())
    return str(value)


def reason(error: Exception) -> str:
    """The system's description of an error, without its number and path; else the error's own message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for matches, name in _KINDS if matches(mode)), "something else")
        raise NotAFile(None, f"it is {kind}, not a file", str(path))


def _items(value: Any) -> list[Any]:
    """The objects and arrays directly inside an object or array."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, dict | list)]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value
