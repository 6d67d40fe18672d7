"""The table of tuned tile sizes by device and shape, which `tools.bench.tune_kernels` measures and writes.

The table is a JSON list of entries in a file next to this one. An entry holds the class of the tiles and their sizes;
what they were tuned for: jax's device kind, the head size, the number of query heads per key head and the bucket of
lengths; and the measurements by which they were chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

TABLE = Path(__file__).with_name("tiles_table.json")
SMALLEST_BUCKET = 1024
KEYS = ("class", "device", "size", "group", "length")  # at most one entry for each combination of these

T = TypeVar("T")
Entry = dict[str, Any]


class Tiles(NamedTuple, Generic[T]):
    """The tiles for a shape. `origin` says in words whether they were tuned or are the defaults of their class."""

    tiles: T
    tuned: bool
    origin: str


def bucket(length: int) -> int:
    """The bucket of a length: the next power of two, at least SMALLEST_BUCKET. All lengths of a bucket share an
    entry."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def lookup(kind: type[T], device: str | None, size: int, group: int, length: int) -> Tiles[T]:
    """The tiles of class `kind` for rows of `length` tokens and `group` query heads of `size` per key head.

    `device`: jax's device kind, or None when it is not known. Where the table has no entry, the tiles are the defaults
    of the class. Raises ValueError where the table is malformed.
    """
    wanted = dict(zip(KEYS, (kind.__name__, device, size, group, bucket(length)), strict=True))
    shape = f"head size {size}, group {group}, rows of up to {bucket(length)}"
    for entry in read_table():
        if all(entry[key] == value for key, value in wanted.items()):
            tiles = _build(kind, entry)
            return Tiles(tiles, True, f"{tiles}, tuned for {device}, {shape}")
    tiles = kind()
    return Tiles(tiles, False, f"{tiles}, the default: not tuned for {device or 'an unknown device'}, {shape}")


@functools.cache
def read_table() -> tuple[Entry, ...]:
    """All entries of the table. Raises ValueError where the file is not a list of entries with all their keys."""
    entries = json.loads(TABLE.read_text())
    if not isinstance(entries, list):
        raise ValueError(f"{TABLE}: expected a list of entries; write it with tools.bench.tune_kernels")
    for entry in entries:
        missing = [key for key in (*KEYS, "tiles", "measured") if key not in entry]
        if missing:
            raise ValueError(f"{TABLE}: an entry without {', '.join(missing)}: {entry}")
    return tuple(entries)


def write_entry(tiles: Any, device: str, size: int, group: int, length: int, measured: dict[str, Any]) -> Entry:
    """Writes tiles into the table atomically, replacing any entry for that device and shape, and returns the entry.

    `measured`: the measurements by which they were chosen, for people to read.
    """
    keys = dict(zip(KEYS, (type(tiles).__name__, device, size, group, bucket(length)), strict=True))
    entry = {**keys, "tiles": dataclasses.asdict(tiles), "measured": measured}
    others = [other for other in read_table() if any(other[key] != keys[key] for key in KEYS)]
    lines = [json.dumps(one) for one in sorted([*others, entry], key=lambda one: [one[key] for key in KEYS])]
    with tempfile.NamedTemporaryFile("w", dir=TABLE.parent, prefix=TABLE.name, delete=False) as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n")
    Path(file.name).chmod(0o644)
    os.replace(file.name, TABLE)
    read_table.cache_clear()
    return entry


def _build(kind: type[T], entry: Entry) -> T:
    try:
        return kind(**entry["tiles"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{TABLE}: {error}, in {entry}; tune that shape again with tools.bench.tune_kernels"
        ) from error
