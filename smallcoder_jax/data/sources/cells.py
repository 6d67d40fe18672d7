"""Rows of any source: the conversion of values to text, and an account of the unusable rows."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from smallcoder_jax.base.display import one_line
from smallcoder_jax.base.errors import UserError

_NAMED = 3  # bad rows that are named; the others are only counted
_COLUMNS = 30  # column names that a message shows


@dataclasses.dataclass(frozen=True)
class Row:
    """A row with its columns, as far as they are known. `place` is the file or the split, and the number of the line or
    row from 1. `problem` says why the row cannot be read; it is empty where the row can be read."""

    place: str
    columns: Mapping[str, Any]
    problem: str = ""


def text_of(value: Any) -> str:
    """A cell as text: null and NaN become empty, bytes are decoded as UTF-8, numbers and nested values become JSON.

    Raises ValueError for bytes that are not UTF-8, and for half a surrogate pair, which JSON permits.
    """
    if hasattr(value, "tolist"):  # numpy values, which TensorFlow Datasets returns
        value = value.tolist()
    if _is_gap(value):
        return ""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
        text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"text that is not valid Unicode: {error.reason}") from error
    return text


def valid_text(text: str) -> str:
    """A path, or a text with a path, that can be stored: bytes that are not UTF-8, which file names may have, become
    escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_gaps(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns without those that are null or NaN, which pandas writes for a missing text."""
    return {name: cell for name, cell in row.items() if not _is_gap(cell)}


def _is_gap(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_nulls(value: Any) -> Any:
    """A nested value of a table without the null fields of its objects. In a table every object has the fields of all
    rows, and null marks those that it lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class Account:
    """Counts the usable and the bad rows of a source. `expected`: the columns that a row needs, in words.

    A source with a few bad rows is accepted, but not silently: bad rows are counted, and the first three are named. If
    no row is usable, that is an error that names the columns found.
    """

    def __init__(self, source: str, expected: str):
        self._source, self._expected = source, expected
        self._columns: dict[str, None] = {}
        self.used, self.bad = 0, 0
        self.named: list[str] = []
        self.notes: collections.Counter[str] = collections.Counter()  # other counts of the caller

    def add_used(self) -> None:
        self.used += 1

    def add_bad(self, row: Row, problem: str) -> str:
        """Counts a bad row, and returns its place and problem as one line."""
        said = one_line(f"{row.place} ({problem})")
        self.bad += 1
        if len(self.named) < _NAMED:
            self.named.append(said)
        if not self.used and len(self._columns) <= _COLUMNS:  # columns are shown only where no row was usable
            self._columns |= dict.fromkeys(map(str, row.columns))
        return said

    def line(self) -> str:
        """A notice about the bad rows; empty where there are none."""
        if not self.bad:
            return ""
        more = f" and {self.bad - len(self.named):,} more" if self.bad > len(self.named) else ""
        rows = self.bad + self.used
        return f"{self._source}: {self.bad:,} of {rows:,} rows cannot be used: {'; '.join(self.named)}{more}"

    def check(self) -> None:
        """Raises UserError where the source has rows and none was usable. Call it at the end of the source."""
        if self.bad and not self.used:
            names = list(self._columns)
            found = ", ".join(names[:_COLUMNS]) + (" and more" if len(names) > _COLUMNS else "")
            raise UserError(
                f"{self.line()}. The columns found are {one_line(found) or 'none'}; expected {self._expected}"
            )


def _plain(value: Any) -> Any:
    """Converts, for `json.dumps`, parts of a nested value that JSON does not support (bytes, numpy, times,
    decimals)."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.tolist() if hasattr(value, "tolist") else str(value)
