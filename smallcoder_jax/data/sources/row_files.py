"""Files of rows on this machine: JSON lines, JSON arrays and Parquet, compressed or not, alone or in a folder.

The size of a row is limited before the row is in memory, so that neither an endless nor a compressed line exhausts the
memory. A row beyond the limit is a bad row, and the rows around it are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import open_regular, parse_json, reason
from smallcoder_jax.data.sources.cells import Row, valid_text, without_nulls

MAX_ROW_BYTES = 16 << 20  # of a line, of an item of an array, of a cell of a table
MAX_LINE_BYTES = 1 << 30  # that are read to find the end of a line; a file with a longer line is rejected
MAX_ARRAY_BYTES = 256 << 20  # of a JSON array, or of objects over several lines, which are read as a whole
_BATCH_ROWS, _BATCH_BYTES = 1024, 16 << 20  # of a table that are in memory at a time
_KINDS: Mapping[str, tuple[str, ...]] = {
    "jsonl": tuple(name + packed for packed in ("", ".gz", ".zst") for name in (".jsonl", ".ndjson", ".json")),
    "parquet": (".parquet",),
}
_SUBFOLDER = "data"  # where data sets of the hub keep their files
# The word for the split in a file name, between these separators, as the hub finds it.
_SPLIT_WORD = re.compile(r"(?:^|[-._ 0-9])(train|validation|valid|val|dev|eval|test)(?=[-._ 0-9]|$)", re.IGNORECASE)
_SPLITS = {"train": "train", "test": "test"}  # all other words mean validation
_ALL = "all"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER = {  # formats that cannot be read as rows of JSON, by the first bytes of a file
    b"PAR1": "Parquet; name it with parquet:PATH",
    b"BZh": "compressed by bzip2; decompress it with bunzip2",
    b"\xfd7zXZ": "compressed by xz; decompress it with unxz",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}
_BOM = b"\xef\xbb\xbf"
# The beginning of an array of objects, or of an object that spans several lines.
_NO_LINES = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*(?:\{|\]|\Z)|\{[ \t]*\r?\n\s*[\x22}])")
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)
_DAMAGE = (OSError, EOFError, zlib.error)


@dataclasses.dataclass(frozen=True)
class RowFiles:
    """The files of a source by the names that the places of rows begin with. `left_out` are files of other splits."""

    source: str
    kind: str
    paths: Mapping[str, Path]
    left_out: tuple[str, ...]

    @property
    def note(self) -> str:
        """A notice about the files that are left out; empty where there are none."""
        if not self.left_out:
            return ""
        taken, others = ", ".join(self.paths), ", ".join(self.left_out)
        return f"{self.source}: reads {taken} and, by their names, not {others}; ?split={_ALL} takes all"

    def rows(self, wanted: Collection[str]) -> Iterator[Row]:
        """Every row, with Parquet only its `wanted` columns. Raises UserError for a file that cannot be read."""
        for name, path in self.paths.items():
            if self.kind == "parquet":
                yield from _parquet_rows(self.source, name, path, wanted)
            else:
                yield from _json_rows(self.source, name, path)

    def hash(self) -> str:
        """A hash over the names, sizes and modification times of the files. Raises UserError for a missing file."""
        digest = hashlib.sha256()
        for name, path in self.paths.items():
            with _named(self.source, path):
                found = path.stat()
            digest.update(f"{name}|{found.st_size}|{found.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def find_files(source: str, kind: str, location: str, split: str | None) -> RowFiles:
    """The files of `kind` (`jsonl` or `parquet`) at `location`: one file, or those in a folder and in its folder
    `data`.

    From a folder it takes the files whose names contain the `split`; without a split, those of `train` if there are
    any, else all. A file whose name contains no split belongs to `train`. Raises UserError where nothing is found.
    """
    path = Path(os.path.expanduser(location))  # ~NAME of an unknown user stays as it is
    with _named(source, path):
        if path.is_dir():
            return _of_folder(source, kind, path, split)
        if not path.exists():
            raise UserError(
                f"data source {source}: {path} does not exist; give a {_KINDS[kind][0]} file or a folder of them"
            )
    if split not in (None, _ALL):
        raise UserError(f"data source {source}: split={split} chooses among the files of a folder; {path} is a file")
    return RowFiles(source, kind, {valid_text(path.name): path}, ())


def _of_folder(source: str, kind: str, folder: Path, split: str | None) -> RowFiles:
    endings = _KINDS[kind]
    found = {
        valid_text(path.relative_to(folder).as_posix()): path
        for where in (folder, folder / _SUBFOLDER)
        if where.is_dir()
        for path in sorted(where.iterdir())
        if path.name.lower().endswith(endings) and not path.name.startswith(".")
    }
    if not found:
        raise UserError(
            f"data source {source}: the folder {folder} holds no {endings[0]} file; give one with files that end with "
            f"one of {', '.join(endings)}"
        )
    splits = {name: _split_of(name) for name in found}
    chosen = split or ("train" if "train" in splits.values() else _ALL)
    taken = {name: path for name, path in found.items() if chosen in (_ALL, splits[name])}
    if not taken:
        known = ", ".join(sorted({*splits.values(), _ALL}))
        raise UserError(f"data source {source}: no file of {folder} is of split={split}; expected one of {known}")
    return RowFiles(source, kind, taken, tuple(name for name in found if name not in taken))


def _split_of(name: str) -> str:
    word = _SPLIT_WORD.search(name.rpartition("/")[2])
    return _SPLITS.get(word[1].lower(), "validation") if word else "train"


@contextlib.contextmanager
def _named(source: str, path: Path) -> Iterator[None]:
    """Turns the system's error about a file into a UserError that names the source and the path."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"data source {source}: {path} cannot be read: {reason(error)}; give a regular file that is whole and may "
            "be read"
        ) from error


def _json_rows(source: str, name: str, path: Path) -> Iterator[Row]:
    with _named(source, path), contextlib.closing(open_regular(path)) as file:
        stream = _decompressed(source, path, file)
        whole = _NO_LINES.match(stream.peek(4096)[:4096])
        for number, text in _items(source, path, stream) if whole else _lines(source, path, stream):
            yield _json_row(f"{name}:{number}", text)


def _json_row(place: str, text: bytes | None) -> Row:
    if text is None:
        return Row(place, {}, f"longer than {MAX_ROW_BYTES:,} bytes")
    try:
        value = parse_json(text.decode("utf-8"), finite_only=False)
    except UnicodeDecodeError as error:
        return Row(place, {}, f"not UTF-8: {error.reason} at byte {error.start:,}")
    except ValueError as error:
        return Row(place, {}, f"no JSON: {error}")
    if not isinstance(value, dict):
        return Row(place, {}, f"a JSON {type(value).__name__} and no object")
    return Row(place, value)


def _decompressed(source: str, path: Path, file: BinaryIO) -> Any:
    """A buffered stream of the text in `file`, decompressed where its first bytes say that it is compressed."""
    assert isinstance(file, io.BufferedReader)
    start = file.peek(8)[:8]
    if start.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if start.startswith(_ZSTD):
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(
                f"data source {source}: {path} is compressed by zstd, which needs pyarrow ({error}): pip install "
                "'smallcoder_jax[hub]', or decompress it with unzstd"
            ) from error
        packed: Any = pyarrow.CompressedInputStream(file, "zstd")
        return io.BufferedReader(packed)
    for mark, what in _OTHER.items():
        if start.startswith(mark):
            raise UserError(f"data source {source}: {path} is {what}; expected rows as JSON, .gz or .zst")
    return file


def _lines(source: str, path: Path, stream: Any) -> Iterator[tuple[int, bytes | None]]:
    """The number and text of every line that is not empty. The text of a line that is too long is None, and such a line
    is never in memory. Raises UserError for a line longer than MAX_LINE_BYTES."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            length = len(line)
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                length += len(rest)
                if length > MAX_LINE_BYTES:
                    raise UserError(
                        f"data source {source}: line {number:,} of {path} is longer than {MAX_LINE_BYTES:,} bytes; "
                        "expected a file with one JSON object a line"
                    )
            yield number, None
        elif line.strip():
            yield number, line


def _items(source: str, path: Path, stream: Any) -> Iterator[tuple[int, bytes | None]]:
    """The number and text of every item of an array, or of every object in a sequence of objects. Each is parsed
    separately, so that a bad one does not affect the others."""
    content = stream.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise UserError(
            f"data source {source}: {path} is one JSON array, or objects over several lines, of more than "
            f"{MAX_ARRAY_BYTES:,} bytes; write one object a line: jq -c '.[]' rows.json > rows.jsonl"
        )
    content = content.removeprefix(_BOM)
    array = content.lstrip().startswith(b"[")
    depth, number, start = 0, 0, 0
    for mark in _STRUCTURE.finditer(content):
        sign = content[mark.start()]
        closes = sign in b"]}"
        if sign in b"[{":
            depth += 1
            start = mark.end() if array and depth == 1 else start
        elif closes:
            depth = max(depth - 1, 0)
        if (closes and depth == 0) or (array and depth == 1 and sign == ord(b",")):
            item, start = content[start : mark.start() if array else mark.end()].strip(), mark.end()
            if item:
                number += 1
                yield number, item if len(item) <= MAX_ROW_BYTES else None
        if closes and depth == 0 and array:
            break
    if content[start:].strip():  # a truncated item, or text after an array
        yield number + 1, content[start : start + MAX_ROW_BYTES]


def _parquet_rows(source: str, name: str, path: Path, wanted: Collection[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"data source {source} needs pyarrow ({error}): pip install 'smallcoder_jax[hub]'") from error
    try:
        with open_regular(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            read = [column for column in names if column in wanted]
            rows = _cells_of_rows(file, read) if read else ({} for _ in range(file.metadata.num_rows))
            for number, cells in enumerate(rows, 1):
                bad = next((f"{column}: {cell.why}" for column, cell in cells.items() if isinstance(cell, _Bad)), "")
                # Includes the names of all columns, so that an error can list them; only wanted columns are read.
                yield Row(f"{name}:{number}", {**dict.fromkeys(names), **cells}, bad)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: a name is not UTF-8
        raise UserError(
            f"data source {source}: {path} cannot be read as Parquet: {reason(error)}; copy it again"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Bad:
    why: str


def _cells_of_rows(file: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    widest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
    size = max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(widest, 1))))
    for batch in file.iter_batches(batch_size=size, columns=columns):
        for cells in zip(*map(_cells, batch.columns), strict=True):
            yield dict(zip(batch.schema.names, cells, strict=True))


def _cells(column: Any) -> list[Any]:
    """The values of a column; `_Bad` for a value that is too long or that Python cannot represent (invalid UTF-8, a
    time out of range)."""
    try:
        cells = column.to_pylist()
    except (ValueError, OverflowError):
        cells = [_cell(value) for value in column]
    return [_bounded(without_nulls(cell)) for cell in cells]


def _bounded(cell: Any) -> Any:
    long = isinstance(cell, str | bytes) and len(cell) > MAX_ROW_BYTES
    return _Bad(f"longer than {MAX_ROW_BYTES:,} bytes") if long else cell


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return _Bad(reason(error))
