"""The corpus: every source is read once, filtered, deduplicated, split by hash and stored as ArrayRecord by TFDS.

A corpus folder that exists is complete, because it is built under another name and renamed. Within a split, the
documents of a source are contiguous, in the order in which the source yields them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smallcoder_jax.base.artifacts import new_folder, short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object, write_json
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.corpus.collect import SourceReport, collect_source
from smallcoder_jax.data.sources.document import DOCUMENT_SPLITS, SPLITS, Document
from smallcoder_jax.data.sources.spec import SourceSpec, check_source, source_identity

FORMAT = 3  # increased whenever the same sources and settings start to give another corpus
ACCOUNTING = "accounting.json"
MIN_REPOSITORIES = 20  # a source with fewer is split by document, because by repository one side could be empty


def corpus_key(specs: Sequence[SourceSpec], data: DataConfig) -> str:
    """The name of the corpus folder: a hash over the sources and the settings that determine the documents."""
    return short_key(
        {
            "format": FORMAT,
            "sources": [source_identity(spec, Path(data.dir)) for spec in specs],
            "min_characters": data.min_characters,
            "max_documents": data.max_documents,
            "validation_fraction": data.validation_fraction,
            "allow_dummy_data": data.allow_dummy_data,
            **({"test_fraction": data.test_fraction} if data.test_fraction else {}),
        }
    )


def ensure_corpus(specs: Sequence[SourceSpec], data: DataConfig, final: Path, progress: Progress | None) -> None:
    """Builds the corpus of these sources in the folder `final`, unless the folder exists already.

    Raises UserError, and leaves no corpus behind, where a source cannot be read or holds nothing usable, where a split
    is empty, and where the disk is full.
    """
    if final.is_dir():
        return
    if not data.allow_dummy_data:
        for spec in specs:
            check_source(spec)
    with new_folder(final) as folder:
        spool = folder / "spool"
        spool.mkdir()
        seen: set[bytes] = set()
        reports = [
            collect_source(spec, data, spool / f"{index}.jsonl", seen, progress) for index, spec in enumerate(specs)
        ]
        sides = [_Side(report, data, _read_spool(spool / f"{index}.jsonl")) for index, report in enumerate(reports)]
        splits = DOCUMENT_SPLITS if data.test_fraction else SPLITS
        accounting = _account(reports, sides, spool, splits)
        _check_splits(accounting, data, splits)
        _write_records(folder, spool, sides, splits)
        shutil.rmtree(spool)
        write_json(folder / ACCOUNTING, accounting)


def read_accounting(folder: Path) -> dict[str, Any]:
    """The accounting of what was read, kept and dropped per source. Raises UserError where `folder` is no corpus."""
    what = f"the accounting of a corpus. Delete {folder} and prepare the data again"
    content = read_json_object(folder / ACCOUNTING, what)
    sources = content.get("sources")
    if not (
        isinstance(content.get("fingerprint"), str)
        and isinstance(content.get("dummy"), bool)
        and isinstance(sources, list)
        and all(map(_is_source, sources))
    ):
        raise UserError(f"{folder / ACCOUNTING} has another form than what was written; expected {what}")
    return content


def _is_source(entry: Any) -> bool:
    """Whether an entry of an accounting has the keys that its readers rely on."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("spec", "split_by")):
        return False
    sides = [entry.get(split) for split in {*SPLITS, *splits_of(entry)}]
    return all(
        isinstance(side, dict) and all(type(side.get(key)) is int and side[key] >= 0 for key in ("documents", "bytes"))
        for side in sides
    )


def splits_of(entry: Mapping[str, Any]) -> list[str]:
    """The splits of a source, by its entry in the accounting."""
    return [split for split in DOCUMENT_SPLITS if split in entry]


def read_split(folder: Path, split: str, source: str | None = None) -> Iterator[Document]:
    """The documents of a split that the corpus has (`splits_of`) in stored order; with `source`, only those of that
    source."""
    accounting = read_accounting(folder)
    start, stop = 0, 0
    for entry in accounting["sources"]:
        stop += entry[split]["documents"]
        if source is None or entry["spec"] == source:
            yield from _read_range(folder, split, start, stop)
        start = stop


def count_documents(folder: Path, split: str) -> int:
    """The number of documents that a split really stores, whatever the accounting says."""
    from smallcoder_jax.data.corpus import builder

    return builder.count(_dataset_info(folder), split)


def training_texts(folder: Path, max_bytes: int) -> Iterator[str]:
    """Texts of the training split for training a tokenizer, about `max_bytes` UTF-8 bytes. Every source contributes the
    same amount from its beginning; where a small source has less, the larger ones contribute more."""
    left = max_bytes
    sources = sorted(read_accounting(folder)["sources"], key=lambda source: source[SPLITS[0]]["bytes"])
    for index, source in enumerate(sources):
        taken, share = 0, left // (len(sources) - index)
        for document in read_split(folder, SPLITS[0], source["spec"]):
            yield document.text
            taken += len(document.text.encode("utf-8"))
            if taken >= share:
                break
        left -= taken


class CorpusFingerprint:
    """A hash over the documents of each split, in order, with their provenance."""

    def __init__(self) -> None:
        self._splits = {split: hashlib.sha256() for split in SPLITS}

    def add(self, split: str, document: Document) -> None:
        fields = [document.hash, document.path, document.repository, document.language, document.license]
        self._splits.setdefault(split, hashlib.sha256()).update(json.dumps(fields).encode())

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(digest.digest() for digest in self._splits.values())).hexdigest()


def _read_range(folder: Path, split: str, start: int, stop: int) -> Iterator[Document]:
    if start == stop:
        return
    from smallcoder_jax.data.corpus import builder

    yield from builder.load_range(_dataset_info(folder), split, start, stop)


def _dataset_info(folder: Path) -> Path:
    info = next(folder.glob("*/*/dataset_info.json"), None)
    if info is None:
        raise UserError(f"{folder} holds no corpus; delete it and prepare the data again")
    return info


class _Side:
    """Assigns a source's documents, or its repositories, to the sides of the split by their place in a random order:
    first those of the validation split, then those of the test split, if there is one. Each side gets at least one if
    there are enough, however small the source is: the first is always held out, and the last never."""

    def __init__(self, report: SourceReport, data: DataConfig, documents: Iterable[Document]):
        self.by = "repository" if report.repositories >= MIN_REPOSITORIES else "document"
        places = {self._place(document) for document in documents}
        self._limit = int(data.validation_fraction * 2**64)
        self._train = int((data.validation_fraction + data.test_fraction) * 2**64)
        if len(places) > 1:
            self._limit = min(max(self._limit, min(places) + 1), max(places))
            least = min(place for place in places if place >= self._limit) + 1 if data.test_fraction else self._limit
            self._train = min(max(self._train, least), max(places))

    def of(self, document: Document) -> str:
        place = self._place(document)
        return "validation" if place < self._limit else "test" if place < self._train else "train"

    def _place(self, document: Document) -> int:
        whole = document.repository if self.by == "repository" and document.repository else document.identity
        return int.from_bytes(hashlib.sha256(b"split|" + whole.encode()).digest()[:8], "big")


def _read_spool(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Document(**json.loads(line))


def _account(
    reports: Sequence[SourceReport], sides: Sequence[_Side], spool: Path, splits: Sequence[str]
) -> dict[str, Any]:
    sources, fingerprint = [], CorpusFingerprint()
    for index, (report, side) in enumerate(zip(reports, sides, strict=True)):
        counts = {split: {"documents": 0, "bytes": 0} for split in splits}
        for document in _read_spool(spool / f"{index}.jsonl"):
            split = side.of(document)
            counts[split]["documents"] += 1
            counts[split]["bytes"] += len(document.text.encode("utf-8"))
            fingerprint.add(split, document)
        sources.append({**report.to_dict(), "split_by": side.by, **counts})
    dummy = any(report.dummy for report in reports)
    return {
        "format": FORMAT,
        "dummy": dummy,
        "fingerprint": fingerprint.hexdigest(),
        "sources": sources,
        "left_out": {report.spec: report.examples for report in reports if report.examples},
    }


def _check_splits(accounting: Mapping[str, Any], data: DataConfig, splits: Sequence[str]) -> None:
    for split in splits:
        if not any(source[split]["documents"] for source in accounting["sources"]):
            kept = sum(source["kept"] for source in accounting["sources"])
            raise UserError(
                f"the {split} split is empty: the sources ({data.sources}) gave {kept} documents and "
                f"{data.validation_fraction=}, {data.test_fraction=}; give more documents or change these"
            )


def _write_records(folder: Path, spool: Path, sides: Sequence[_Side], splits: Sequence[str]) -> None:
    from smallcoder_jax.data.corpus import builder

    def documents(split: str) -> Iterator[Document]:
        for index, side in enumerate(sides):
            for document in _read_spool(spool / f"{index}.jsonl"):
                if side.of(document) == split:
                    yield document

    builder.store(folder, {split: functools.partial(documents, split) for split in splits})
