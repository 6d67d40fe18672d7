"""Reads one source to its end: filters, deduplicates and counts its documents, and writes those kept to a spool
file."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smallcoder_jax.base.display import one_line
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.corpus.clean import REASONS, drop_reason
from smallcoder_jax.data.corpus.statistics import DocumentStatistics
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.spec import SourceSpec, read_source

_NAMED = 3  # unreadable documents that the printed line names
DUMMY_SOURCE = "dummy"
_DUMMY_DOCUMENTS = 400
MAX_EXAMPLES = 20  # paths for each reason


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """Counts of what happened to everything that a source holds. `passed_over` counts by reason what was never read as
    a document, and `examples` holds by reason the first paths of what was not kept."""

    spec: str
    read: int
    kept: int
    dropped: dict[str, int]
    duplicates: int
    unreadable: int
    passed_over: dict[str, int]
    repositories: int
    dummy: str  # why generated text replaces the source; "" where it does not
    statistics: dict[str, Any]
    examples: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """All fields except the examples, which are no counts and which the accounting stores separately."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "examples"}


def collect_source(
    spec: SourceSpec, data: DataConfig, spool: Path, seen: set[bytes], progress: Progress | None
) -> SourceReport:
    """Writes the kept documents of `spec` to `spool`, one JSON object per line, and counts the rest.

    `seen` holds the identities of the documents of all earlier sources; those of this source are added. Unless
    `data.allow_dummy_data`, raises UserError where the source cannot be read or none of its documents is kept.
    """
    if progress:
        progress.start(f"reading {spec.text}")
    collector = _Collector(spec, data, seen, progress)
    try:
        report = collector.collect(read_source(spec, Path(data.dir)), spool, dummy="")
    except UserError as error:
        if not data.allow_dummy_data:
            raise
        collector = _Collector(spec, data, seen, progress)
        report = collector.collect(_dummy_documents(spec.text), spool, dummy=str(error))
    seen |= collector.own
    if progress:
        progress.finish()
        if report.unreadable:
            named = one_line("; ".join(report.examples.get("unreadable", ())[:_NAMED]))
            more = " and more" if report.unreadable > _NAMED else ""
            progress.note(f"{spec.text}: {report.unreadable:,} of {report.read:,} cannot be read: {named}{more}")
        if others := report.passed_over.get("other_split"):
            progress.note(f"{spec.text}: {others:,} files are of other splits by their names; ?split=all takes all")
    return report


class _Collector:
    def __init__(self, spec: SourceSpec, data: DataConfig, seen: set[bytes], progress: Progress | None):
        self._spec, self._data, self._seen, self._progress = spec, data, seen, progress
        self.own: set[bytes] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        self._passed_over: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, list[str]] = collections.defaultdict(list)
        self._repositories: set[str] = set()
        self._statistics = DocumentStatistics()

    def collect(self, items: Iterator[Document | Skipped], spool: Path, dummy: str) -> SourceReport:
        usable_until = 0  # how many documents had been read when the last one was kept
        with spool.open("w", encoding="utf-8") as file:
            for item in items:
                if self._keep(item):
                    assert isinstance(item, Document)
                    usable_until = self._counts["read"]
                    file.write(json.dumps(dataclasses.asdict(item)) + "\n")
                    if 0 < self._data.max_documents <= self._counts["kept"]:
                        break
                # An endless stream has no end at which it could be found that nothing in it is usable.
                elif (
                    self._data.packing == "document" and self._counts["read"] - usable_until >= self._data.max_unusable
                ):
                    raise UserError(self._too_many_unusable())
        if not self._counts["kept"]:
            raise UserError(self._nothing_kept())
        return SourceReport(
            spec=self._spec.text,
            read=self._counts["read"],
            kept=self._counts["kept"],
            dropped={reason: self._counts[reason] for reason in REASONS},
            duplicates=self._counts["duplicate"],
            unreadable=self._counts["unreadable"],
            passed_over=dict(sorted(self._passed_over.items())),
            repositories=len(self._repositories),
            dummy=dummy,
            statistics=self._statistics.summary(),
            examples=dict(sorted(self._examples.items())),
        )

    def _keep(self, item: Document | Skipped) -> bool:
        if isinstance(item, Skipped):
            counted = item.reason in ("unreadable", *REASONS)
            self._counts.update(("read", item.reason) if counted else ())
            self._passed_over.update(() if counted else (item.reason,))
            self._add_example(item.reason, item.path)
            return False
        self._counts["read"] += 1
        reason = drop_reason(item, self._data.min_characters)
        digest = bytes.fromhex(item.identity)
        if reason is None and (digest in self.own or digest in self._seen):
            reason = "duplicate"
        if reason is not None:
            self._counts[reason] += 1
            self._add_example(reason, item.path)
            return False
        size = len(item.text.encode("utf-8"))
        self.own.add(digest)
        self._counts["kept"] += 1
        if item.repository:
            self._repositories.add(item.repository)
        self._statistics.add(item, size)
        if self._progress:
            self._progress.add(size)
        return True

    def _add_example(self, reason: str, path: str) -> None:
        if path and len(self._examples[reason]) < MAX_EXAMPLES:
            self._examples[reason].append(path)

    def _too_many_unusable(self) -> str:
        reasons = ", ".join(
            f"{key} {n}" for key, n in sorted(self._counts.items()) if key not in ("read", "kept") and n
        )
        return (
            f"data source {self._spec.text}: {self._data.max_unusable} documents in a row were unusable (of "
            f"{self._counts['read']} read so far: {reasons}). Look at the source, lower data.min_characters or raise "
            "data.max_unusable"
        )

    def _nothing_kept(self) -> str:
        name = f"data source {self._spec.text}"
        found = {key: n for key, n in sorted((self._counts + self._passed_over).items()) if key != "read" and n}
        if not found:
            return f"{name} is empty: there is no document in it; give a source that holds source code or text"
        reasons = ", ".join(f"{key} {n} ({', '.join(self._examples[key][:1])})" for key, n in found.items())
        keep = "; what .gitignore names is read with dir:PATH?ignored=keep" if "ignored" in found else ""
        return (
            f"{name} holds no usable document; what it holds was dropped or passed over: {reasons}. Give a source with "
            f"source code or text of at least data.min_characters={self._data.min_characters} characters{keep}"
        )


def _dummy_documents(spec: str) -> Iterator[Document]:
    """Generated functions, which differ between sources and are always the same for one source."""
    words = ("count", "value", "index", "total", "result", "item", "left", "right", "size", "offset", "key", "node")
    for number in range(_DUMMY_DOCUMENTS):
        draw = random.Random(f"{spec}|{number}")
        lines = [f"# generated stand-in {number} for {spec}"]
        for _ in range(draw.randint(1, 6)):
            name, first, second = draw.choice(words), *draw.sample(words, 2)
            lines += [f"def {name}_{draw.randrange(1000)}({first}, {second}):"]
            lines += [f"    {name} = {first} {draw.choice('+-*')} {second} * {draw.randrange(100)}"]
            lines += [f"    return {name} if {first} > {draw.randrange(100)} else {second}", ""]
        yield Document("\n".join(lines), DUMMY_SOURCE, f"dummy-{number}.py", "", "python")
