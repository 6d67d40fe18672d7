"""Source specs, `SPEC[@WEIGHT][!nofim]` separated by commas, and the documents of each source.

A path may contain the characters that separate the parts of a spec. The longest part of a spec that exists as a path is
the path. Where none exists, options, weight and mark are split off from the right. Everything between quotation marks
(`dir:"a, b"`) is path.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import nearest
from smallcoder_jax.data.sources import local, tables
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.prose import files_of_prose, read_prose
from smallcoder_jax.data.sources.row_files import find_files
from smallcoder_jax.data.sources.tree import File

# Each kind, and the options that may follow a `?`.
KINDS: Mapping[str, tuple[str, ...]] = {
    "stdlib": (),
    "installed": (),
    "prose": (),
    "dir": ("ignored",),
    "jsonl": ("split", "column"),
    "parquet": ("split", "column"),
    "tfds": ("split", "column"),
    "hf": ("config", "split", "column", "streaming"),
}
_WITHOUT_LOCATION = ("stdlib", "installed", "prose")
_PATHS = ("dir", "jsonl", "parquet")
_QUOTED = re.compile(r"\s*\w+:\"[^\"]*\"")
_BEHIND = "[?OPTIONS][@WEIGHT][!nofim]"
_MARK = "!nofim"
# What may follow a path. It contains no slash, so that none of the path's folders is taken for a weight or an option.
_WEIGHT = re.compile(r"(?P<rest>.+)@(?P<weight>[^@!/]*)", re.DOTALL)
_QUERY = re.compile(r"(?P<rest>.+?)\?(?P<query>\w+(?:=[^?]*)?)", re.DOTALL)
_QUOTING = 'a path with any of , ? @ ! in it can be quoted: {kind}:"PATH"'
_FILE_KINDS = {".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # .json also matches .jsonl


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source: its location and options, its weight per token in the mixture, and whether FIM may rearrange it."""

    kind: str
    location: str
    options: tuple[tuple[str, str], ...]
    weight: float
    fim: bool

    @property
    def text(self) -> str:
        """The spec without weight and FIM mark, the name of the source in the accounting and the provenance."""
        options = "&".join(f"{key}={value}" for key, value in self.options)
        quoted = self.kind in _PATHS and re.search("[,?@!]", self.location) and '"' not in self.location
        location = f'"{self.location}"' if quoted else self.location
        return self.kind + (f":{location}" if location else "") + (f"?{options}" if options else "")


def parse_sources(text: str) -> tuple[SourceSpec, ...]:
    """The sources that `data.sources` names. Raises UserError that names the wrong part and what is possible."""
    parts = _split(text)
    if not all(parts):
        raise UserError(f"data.sources={text!r} has an empty source; expected SPEC[@WEIGHT][!nofim], comma-separated")
    specs = tuple(_parse(part) for part in parts)
    names = [spec.text for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.sources={text!r} names {name} twice; name it once, with the sum of the weights")
    return specs


def check_source(spec: SourceSpec) -> None:
    """Raises UserError where a source on this machine does not exist. Called before any source is read."""
    if spec.kind == "dir":
        local.check_folder(spec.text, spec.location)
    elif spec.kind in _PATHS:
        find_files(spec.text, spec.kind, spec.location, dict(spec.options).get("split"))


def read_source(spec: SourceSpec, data_dir: Path) -> Iterator[Document | Skipped]:
    """Every document of a source, always in the same order. A `dir:` source excludes prepared data in `data_dir` and
    runs. Raises UserError where the source cannot be read."""
    options = dict(spec.options)
    if spec.kind == "stdlib":
        return local.read_stdlib(spec.text)
    if spec.kind == "installed":
        return local.read_installed(spec.text)
    if spec.kind == "prose":
        return read_prose(spec.text)
    if spec.kind == "dir":
        return local.read_folder(spec.text, spec.location, options, _real(data_dir))
    readers = {
        "jsonl": tables.read_jsonl,
        "parquet": tables.read_parquet,
        "tfds": tables.read_tfds,
        "hf": tables.read_hugging_face,
    }
    return readers[spec.kind](spec.text, spec.location, options)


def source_identity(spec: SourceSpec, data_dir: Path) -> str:
    """A text for the corpus key that determines a source's documents; for local files, by name, size and modification
    time."""
    if spec.kind not in (*_WITHOUT_LOCATION, *_PATHS):
        return spec.text
    python = sys.version if spec.kind == "stdlib" else ""
    return f"{spec.text}|{python}|{local.listing_hash(_listing(spec, data_dir), changes=spec.kind in _PATHS)}"


def _listing(spec: SourceSpec, data_dir: Path) -> Iterable[File]:
    """The files of a source on this machine that would be read; none where the source does not exist."""
    options = dict(spec.options)
    if spec.kind == "dir":
        return local.files_of_folder(spec.text, spec.location, options, _real(data_dir))
    if spec.kind in _WITHOUT_LOCATION:
        return {"stdlib": local.files_of_stdlib, "installed": local.files_of_packages, "prose": files_of_prose}[
            spec.kind
        ]()
    try:
        found = find_files(spec.text, spec.kind, spec.location, options.get("split"))
    except UserError:
        return ()
    return [File(path, name, "", "") for name, path in found.paths.items()]


def _real(folder: Path) -> Path:
    # Path.resolve raises on a loop of links. That such a folder cannot be used is reported where it is created.
    return Path(os.path.realpath(folder.expanduser()))


def _exists(location: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(location))
    except ValueError:  # a zero byte
        return False


def _split(text: str) -> list[str]:
    """Splits a list into its sources. A comma between quotation marks, or in a path that exists, does not separate."""
    parts = [""]
    at = 0
    while at < len(text):
        quoted = _QUOTED.match(text, at) if not parts[-1] else None
        if quoted:
            parts[-1], at = quoted[0], quoted.end()
        elif text[at] == ",":
            parts.append("")
            at += 1
        else:
            parts[-1] += text[at]
            at += 1
    joined: list[str] = []
    while parts:
        ends = range(len(parts), 1, -1) if parts[0].strip().partition(":")[0] in _PATHS else ()
        count = next((end for end in ends if _is_path(",".join(parts[:end]).strip())), 1)
        joined.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return joined


def _is_path(part: str) -> bool:
    """Whether a source names a path that exists, with or without the parts that may follow the path."""
    return any(_exists(location) for location, *_ in _readings(part.partition(":")[2]))


def _readings(text: str) -> Iterator[tuple[str, str, str | None, bool]]:
    """The ways to split `LOCATION[?QUERY][@WEIGHT][!nofim]`, the longest location first: location, query, weight, and
    whether the mark is present."""
    rest, query, weight, mark = text, "", None, False
    yield rest, query, weight, mark
    if rest.endswith(_MARK):
        rest, mark = rest.removesuffix(_MARK), True
        yield rest, query, weight, mark
    found = _WEIGHT.fullmatch(rest)
    if found:
        rest, weight = found["rest"], found["weight"]
        yield rest, query, weight, mark
    found = _QUERY.fullmatch(rest)
    if found:
        yield found["rest"], found["query"], weight, mark


def _parse(part: str) -> SourceSpec:
    kind, colon, behind = part.partition(":")
    if not colon:
        *_, (kind, query, weight, mark) = _readings(part)
        location = ""
    elif behind.startswith('"') and '"' in behind[1:] and kind in _PATHS:
        location, _, after = behind[1:].partition('"')
        *_, (left, query, weight, mark) = _readings(f"x{after}")
        if left != "x":
            raise UserError(
                f"data.sources: {part!r} continues after the quoted path with {after!r}; expected {_BEHIND}"
            )
    else:
        *_, most = readings = list(_readings(behind))
        exists = (reading for reading in readings if kind in _PATHS and _exists(reading[0]))
        location, query, weight, mark = next(exists, most)
    if kind not in KINDS:
        raise UserError(f"data.sources: unknown kind of source '{kind}' in {part!r}; {_nearest_kind(kind, part)}")
    if colon if kind in _WITHOUT_LOCATION else not location:
        shape = kind if kind in _WITHOUT_LOCATION else f"{kind}:{'NAME' if kind in ('hf', 'tfds') else 'PATH'}"
        raise UserError(f"data.sources: {part!r} should read {shape}[@WEIGHT][!nofim]")
    options = tuple((key, value) for key, _, value in (item.partition("=") for item in query.split("&") if item))
    for key, _ in options:
        if key not in KINDS[kind]:
            known = f"; {nearest(key, list(KINDS[kind]))}" if KINDS[kind] else "; this kind has none"
            raise UserError(f"data.sources: unknown option '{key}' in {part!r}{known}{_how_to_quote(kind)}")
    return SourceSpec(kind, location, options, _weight(part, kind, weight), not mark)


def _nearest_kind(kind: str, part: str) -> str:
    """A hint for a source without a known kind, which is probably a path or a misspelt kind."""
    if part.startswith((".", "~")) or os.sep in part.partition(":")[0] or _exists(part):
        kinds = [file_kind for suffix, file_kind in _FILE_KINDS.items() if suffix in part.lower()]
        likely = "dir" if not kinds or os.path.isdir(os.path.expanduser(part)) else kinds[0]
        return f"a path needs its kind before it: did you mean '{likely}:{part}'?"
    return nearest(kind, list(KINDS))


def _how_to_quote(kind: str) -> str:
    return f"; {_QUOTING.format(kind=kind)}" if kind in _PATHS else ""


def _weight(part: str, kind: str, text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.0 < weight < float("inf"):
        raise UserError(
            f"data.sources: {part!r} has the weight {text!r}; expected a positive number after @{_how_to_quote(kind)}"
        )
    return weight
