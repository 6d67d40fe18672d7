"""Token shards: ArrayRecord files of token ids, one record per document, and the manifest that describes them.

A folder of shards is complete when it holds `manifest.json`, which is written last, and by a rename. Each record is
stored in its own group, so that reading one costs a single small read, and uncompressed, because records are read far
more often than written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from smallcoder_jax.base.checksums import checksums_of, is_checksum
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json, reason, write_json
from smallcoder_jax.data.sources.document import DOCUMENT_SPLITS, SPLITS

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 4 << 20  # after this many tokens a new file is started
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of one source: its files in reading order, and their content. `tokens` includes BOS and EOS."""

    files: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int  # UTF-8 bytes of the text, without specials


@dataclasses.dataclass(frozen=True)
class SourceEntry:
    """One source of the mixture. `fim` says whether its documents may be rearranged for fill-in-the-middle."""

    spec: str
    weight: float
    fim: bool
    train: Split
    validation: Split
    test: Split | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that it has, by name."""
        found = {name: getattr(self, name) for name in DOCUMENT_SPLITS}
        return {name: split for name, split in found.items() if split is not None}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a folder of token shards, and what it was made from."""

    tokenizer_hash: str
    tokenizer: str  # the tokenizer's folder, relative to the folder of the shards
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    fingerprint: str
    dummy: bool
    sources: tuple[SourceEntry, ...]
    accounting: Mapping[str, Any]
    checksums: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # by file: `bytes`, `sha256`
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class SourceTokens:
    """The data that `write_tokens` stores for one source: for each split that it has, pairs (ids with BOS and EOS,
    UTF-8 bytes)."""

    spec: str
    weight: float
    fim: bool
    train: Iterable[tuple[Sequence[int] | np.ndarray, int]]
    validation: Iterable[tuple[Sequence[int] | np.ndarray, int]]
    test: Iterable[tuple[Sequence[int] | np.ndarray, int]] | None = None


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type for storing every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_tokens(
    folder: Path,
    sources: Sequence[SourceTokens],
    *,
    vocab_size: int,
    tokenizer_hash: str,
    tokenizer: str,
    dummy: bool = False,
    accounting: Callable[[Sequence[SourceEntry]], Mapping[str, Any]] = lambda entries: {},
) -> Manifest:
    """Writes the shards of every source and finally the manifest. Creates `folder`, which must not hold shards yet.

    `accounting` is called with the finished entries and returns further JSON values for the manifest. Raises ValueError
    for an id outside the vocabulary, and OSError where the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    digest = _Fingerprint(vocab_size, tokenizer_hash)
    entries = []
    for index, source in enumerate(sources):
        digest.source(source.weight, source.fim)
        splits = {}
        for name in DOCUMENT_SPLITS:
            given = getattr(source, name)
            if given is not None:
                digest.split(name)
                splits[name] = _write_split(folder, f"{index:03d}-{name}", given, dtype, vocab_size, digest)
        entries.append(SourceEntry(source.spec, source.weight, source.fim, **splits))
    manifest = Manifest(
        tokenizer_hash,
        tokenizer,
        dtype,
        vocab_size,
        digest.hexdigest(),
        dummy,
        tuple(entries),
        accounting(entries),
        checksums_of(folder, _file_names(entries)),
    )
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises UserError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    again = f"Prepare the data again: delete {folder} and run the same command"
    plain = read_json(path, f"the manifest of a finished folder of token shards. {again}")
    try:
        manifest = parse_manifest(plain)
    except ValueError as error:
        raise UserError(f"{path} is not a manifest: {error}. {again}") from error
    for name in _file_names(manifest.sources):
        if Path(name).name != name:
            raise UserError(f"{path} names the file {name!r}, which is outside its folder. {again}")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is named by the manifest but does not exist. {again}")
        size, recorded = (folder / name).stat().st_size, manifest.checksums.get(name, {}).get("bytes")
        if recorded is not None and size != recorded:
            raise UserError(f"{folder / name} has {size:,} bytes, the manifest says {recorded:,}. {again}")
    return manifest


def parse_manifest(plain: Any) -> Manifest:
    """The manifest from plain values, the inverse of `dataclasses.asdict`. Raises ValueError for another format, and
    for invalid values."""
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        found = plain.get("format") if isinstance(plain, dict) else type(plain).__name__
        raise ValueError(f"it has format {found!r}, where this version reads format {FORMAT}")
    try:
        manifest = Manifest(**{**plain, "sources": tuple(_source_entry(source) for source in plain["sources"])})
        _check_values(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return manifest


def has_fingerprint(path: Path, fingerprint: str) -> bool:
    """Whether `path` is a manifest with this fingerprint; False for a damaged manifest."""
    try:
        return parse_manifest(read_json(path, "a manifest")).fingerprint == fingerprint
    except (UserError, ValueError):
        return False


def read_records(folder: Path, files: Sequence[str], dtype: str) -> Iterator[np.ndarray]:
    """The ids of every document, file after file, in stored order. Raises UserError that names a damaged file."""
    for name in files:
        with damage_named(folder / name):
            reader = ArrayRecordReader(str(folder / name))
        try:
            for start in range(0, reader.num_records(), 1024):
                with damage_named(folder / name):
                    records = reader.read(start, min(start + 1024, reader.num_records()))
                for record in records:
                    yield np.frombuffer(record, dtype=np.dtype(dtype).newbyteorder("<"))
        finally:
            reader.close()


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns errors of the shard reader into a UserError that names the file, or the folder of several files."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        folder = path if path.is_dir() else path.parent
        raise UserError(
            f"{path} is damaged: {reason(error)}. Prepare the data again: delete {folder} and run the same command"
        ) from error


def compute_fingerprint(folder: Path, manifest: Manifest) -> str:
    """The fingerprint of the shards' present content, which equals `manifest.fingerprint` unless something changed."""
    digest = _Fingerprint(manifest.vocab_size, manifest.tokenizer_hash)
    for source in manifest.sources:
        digest.source(source.weight, source.fim)
        for name, split in source.splits.items():
            digest.split(name)
            for ids in read_records(folder, split.files, manifest.dtype):
                digest.record(ids.tobytes())
    return digest.hexdigest()


def _write_split(
    folder: Path,
    stem: str,
    documents: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    dtype: str,
    vocab_size: int,
    digest: _Fingerprint,
) -> Split:
    files: list[str] = []
    writer, records = None, 0
    count, tokens, size, in_shard = 0, 0, 0, 0
    for ids, document_bytes in documents:
        array = np.asarray(ids)
        if array.size and (int(array.min()) < 0 or int(array.max()) >= vocab_size):
            raise ValueError(f"token id outside the vocabulary of {vocab_size} in {stem}, document {count}")
        if writer is None or in_shard >= SHARD_TOKENS:
            if writer is not None:
                _close(folder / files[-1], writer, records)
            files.append(f"{stem}-{len(files):05d}.array_record")
            writer, records, in_shard = ArrayRecordWriter(str(folder / files[-1]), WRITER_OPTIONS), 0, 0
        record = array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        writer.write(record)
        digest.record(record)
        count, tokens, size = count + 1, tokens + array.size, size + document_bytes
        records, in_shard = records + 1, in_shard + array.size
    if writer is not None:
        _close(folder / files[-1], writer, records)
    return Split(tuple(files), count, tokens, size)


def _close(path: Path, writer: ArrayRecordWriter, records: int) -> None:
    """Closes a shard and checks that it can be read, because ArrayRecord may not report a full disk."""
    writer.close()
    reader = ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != records:
        raise OSError(f"{path} holds {found} of the {records} records written to it")


def _file_names(sources: Sequence[SourceEntry]) -> list[str]:
    return [name for source in sources for split in source.splits.values() for name in split.files]


def _check_values(manifest: Manifest) -> None:
    """Raises ValueError for a value that a manifest cannot have."""
    names = _file_names(manifest.sources)
    counts = [(split.documents, split.tokens, split.bytes) for s in manifest.sources for split in s.splits.values()]
    sound = (
        all(isinstance(text, str) for text in (manifest.fingerprint, manifest.tokenizer_hash, *names)),
        manifest.dtype in ("uint16", "uint32"),
        all(type(number) is int and number >= 0 for number in (manifest.vocab_size, *itertools.chain(*counts))),
        all(isinstance(source.weight, int | float) and source.weight >= 0 for source in manifest.sources),
        all(map(is_checksum, manifest.checksums.values())),
        not manifest.checksums or manifest.checksums.keys() == set(names),
    )
    if not all(sound):
        raise ValueError("a value in it has another form than the one that was written")


def _source_entry(plain: Mapping[str, Any]) -> SourceEntry:
    names = SPLITS if plain.get("test") is None else DOCUMENT_SPLITS
    splits = {name: Split(**{**plain[name], "files": tuple(plain[name]["files"])}) for name in names}
    return SourceEntry(**{**plain, **splits})


class _Fingerprint:
    """A hash over settings and records that is independent of paths and of how records are distributed over files."""

    def __init__(self, vocab_size: int, tokenizer_hash: str):
        self._hash = hashlib.sha256(f"{FORMAT}|{vocab_size}|{tokenizer_hash}".encode())

    def source(self, weight: float, fim: bool) -> None:
        self._hash.update(f"source|{weight!r}|{fim}".encode())

    def split(self, name: str) -> None:
        self._hash.update(name.encode())

    def record(self, record: bytes) -> None:
        self._hash.update(len(record).to_bytes(8, "little"))
        self._hash.update(record)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
