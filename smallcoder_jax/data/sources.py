"""Source specs: `SPEC[@WEIGHT][!nofim]`, separated by commas, and the documents behind each."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import nearest
from smallcoder_jax.data import local, tables
from smallcoder_jax.data.documents import Document, Skipped
from smallcoder_jax.data.prose import read_prose

# Each kind, and the options that may follow a `?`.
KINDS: Mapping[str, tuple[str, ...]] = {
    "stdlib": (),
    "installed": (),
    "prose": (),
    "dir": (),
    "jsonl": ("split", "column"),
    "parquet": ("split", "column"),
    "tfds": ("split", "column"),
    "hf": ("config", "split", "column", "streaming"),
}
_WITHOUT_LOCATION = ("stdlib", "installed", "prose")
_LOCAL = ("stdlib", "installed", "prose", "dir", "jsonl", "parquet")
_SHAPE = re.compile(r"(?P<spec>.+?)(?:@(?P<weight>[^@!]*))?(?P<nofim>!nofim)?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source: where its documents are, its weight per token in the mixture, and whether FIM may rearrange it."""

    kind: str
    location: str
    options: tuple[tuple[str, str], ...]
    weight: float
    fim: bool

    @property
    def text(self) -> str:
        """The spec without weight and FIM mark, as accounting and provenance name the source."""
        options = "&".join(f"{key}={value}" for key, value in self.options)
        return self.kind + (f":{self.location}" if self.location else "") + (f"?{options}" if options else "")


def parse_sources(text: str) -> tuple[SourceSpec, ...]:
    """The sources that `data.sources` names. Raises UserError naming the part that is wrong and what is known."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"data.sources={text!r} has an empty source; expected SPEC[@WEIGHT][!nofim], comma-separated")
    specs = tuple(_parse(part) for part in parts)
    names = [spec.text for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.sources={text!r} names {name} twice; name it once, with the sum of the weights")
    return specs


def read_source(spec: SourceSpec, data_dir: Path) -> Iterator[Document | Skipped]:
    """Every document of a source, in an order that is always the same. Prepared data in `data_dir`, and runs, are no
    part of a `dir:` that holds them. Raises UserError where the source cannot be read."""
    options = dict(spec.options)
    if spec.kind == "stdlib":
        return local.read_stdlib(spec.text)
    if spec.kind == "installed":
        return local.read_installed(spec.text)
    if spec.kind == "prose":
        return read_prose(spec.text)
    if spec.kind == "dir":
        return local.read_folder(spec.text, spec.location, _real(data_dir))
    readers = {
        "jsonl": tables.read_jsonl,
        "parquet": tables.read_parquet,
        "tfds": tables.read_tfds,
        "hf": tables.read_hugging_face,
    }
    return readers[spec.kind](spec.text, spec.location, options)


def source_identity(spec: SourceSpec, data_dir: Path) -> str:
    """What decides a source's documents, for the corpus key; local files count by name, size and time of change."""
    if spec.kind in _LOCAL:
        return f"{spec.text}|{local.listing_hash(spec.kind, spec.location, _real(data_dir))}"
    return spec.text


def _real(folder: Path) -> Path:
    # Path.resolve raises on a loop of links; that such a folder cannot be used is said where it is made.
    return Path(os.path.realpath(folder.expanduser()))


def _parse(part: str) -> SourceSpec:
    match = _SHAPE.fullmatch(part)
    assert match is not None  # any text that is not empty fits
    spec, weight = match["spec"], _weight(part, match["weight"])
    address, _, query = spec.partition("?")
    kind, colon, location = address.partition(":")
    if kind not in KINDS:
        raise UserError(f"data.sources: unknown kind of source '{kind}' in {part!r}; {nearest(kind, list(KINDS))}")
    if colon if kind in _WITHOUT_LOCATION else not location:
        shape = kind if kind in _WITHOUT_LOCATION else f"{kind}:{'NAME' if kind in ('hf', 'tfds') else 'PATH'}"
        raise UserError(f"data.sources: {part!r} should read {shape}[@WEIGHT][!nofim]")
    options = tuple((key, value) for key, _, value in (item.partition("=") for item in query.split("&") if item))
    for key, _ in options:
        if key not in KINDS[kind]:
            known = f"; {nearest(key, list(KINDS[kind]))}" if KINDS[kind] else "; this kind has none"
            raise UserError(f"data.sources: unknown option '{key}' in {part!r}{known}")
    return SourceSpec(kind, location, options, weight, match["nofim"] is None)


def _weight(part: str, text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.0 < weight < float("inf"):
        raise UserError(f"data.sources: {part!r} has the weight {text!r}; expected a positive number after @")
    return weight
