"""Documents from rows: JSON, Parquet, TensorFlow Datasets and the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.sources.cells import Account, Row, text_of, valid_text, without_nulls
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.languages import language_of
from smallcoder_jax.data.sources.row_files import find_files

TEXT_COLUMNS = ("content", "text", "code")
_PATH_COLUMNS = ("path", "max_stars_repo_path", "file_path", "filename", "id")
_REPOSITORY_COLUMNS = ("repo", "repository", "repository_name", "repo_name", "max_stars_repo_name")
_LANGUAGE_COLUMNS = ("lang", "language", "programming_language")
_SWITCH = {"1": True, "true": True, "0": False, "false": False}
_LICENSE_COLUMNS = ("license", "licenses", "max_stars_repo_licenses")
_ABOUT_COLUMNS = (*_PATH_COLUMNS, *_REPOSITORY_COLUMNS, *_LANGUAGE_COLUMNS, *_LICENSE_COLUMNS)


@dataclasses.dataclass(frozen=True)
class KnownDataset:
    """How a data set of the hub is read by default. `column` may join several columns with `+`.

    `folders`: instead of named configurations the data set has a folder `data/LANGUAGE` for each language.
    """

    name: str
    column: str
    split: str = "train"
    streaming: bool = False
    folders: bool = False


KNOWN_DATASETS: Mapping[str, KnownDataset] = {
    "bigcode/the-stack-smol": KnownDataset("bigcode/the-stack-smol", "content", folders=True),
    "the-stack-smol": KnownDataset("bigcode/the-stack-smol", "content", folders=True),
    "bigcode/the-stack": KnownDataset("bigcode/the-stack", "content", streaming=True, folders=True),
    "the-stack": KnownDataset("bigcode/the-stack", "content", streaming=True, folders=True),
    "bigcode/the-stack-dedup": KnownDataset("bigcode/the-stack-dedup", "content", streaming=True, folders=True),
    "the-stack-dedup": KnownDataset("bigcode/the-stack-dedup", "content", streaming=True, folders=True),
    "roneneldan/TinyStories": KnownDataset("roneneldan/TinyStories", "text"),
    "vicgalle/alpaca-gpt4": KnownDataset("vicgalle/alpaca-gpt4", "instruction+input+output"),
    "cerebras/SlimPajama-627B": KnownDataset("cerebras/SlimPajama-627B", "text", streaming=True),
    "CodeAlpaca": KnownDataset("sahil2801/CodeAlpaca-20k", "instruction+input+output"),
    "Evol-Instruct-Code": KnownDataset("nickrosh/Evol-Instruct-Code-80k-v1", "instruction+output"),
    "glaive-code-assistant": KnownDataset("glaiveai/glaive-code-assistant", "question+answer"),
}


def read_jsonl(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """The JSON objects of a file, or of the files of a folder: one object per line, or those of one array."""
    return _read_files(source, "jsonl", location, options)


def read_parquet(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """The rows of a Parquet file, or of the files of a folder."""
    return _read_files(source, "parquet", location, options)


def _read_files(source: str, kind: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    files = find_files(source, kind, location, options.get("split"))
    for name in files.left_out:
        yield Skipped("other_split", name)
    columns = _Columns(source, options.get("column", ""))
    yield from columns.documents(files.rows(columns.wanted))


def read_tfds(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """A split of a data set of TensorFlow Datasets, which is downloaded and prepared if necessary."""
    import tensorflow_datasets as tfds

    split = options.get("split", "train")
    try:
        builder: Any = tfds.builder(location, file_format="array_record")
        builder.download_and_prepare()
        rows = iter(builder.as_data_source(split))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(_ways_out(source, error, "TFDS_DATA_DIR")) from error
    columns = _Columns(source, options.get("column", ""))
    yield from columns.documents(columns.checked(_numbered(f"{location}/{split}", rows)))


def read_hugging_face(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """A split of a data set of the Hugging Face hub. Raises UserError that names the cause and three alternatives."""
    columns = _Columns(source, options.get("column", _known(location).column))
    yield from columns.documents(columns.checked(hugging_face_rows(source, location, options, columns.wanted)))


def hugging_face_rows(source: str, location: str, options: Mapping[str, str], wanted: Collection[str]) -> Iterator[Row]:
    """The rows of a split, of which only the `wanted` columns are decoded. Raises UserError that names the cause and
    three alternatives."""
    known = _known(location)
    streaming = known.streaming
    if "streaming" in options:
        streaming = _SWITCH.get(options["streaming"].lower())
        if streaming is None:
            raise UserError(
                f"data source {source}: streaming={options['streaming']!r} is neither on nor off; give one of "
                f"{', '.join(_SWITCH)}"
            )
    split, config = options.get("split", known.split), options.get("config")
    name, folder = (None, f"data/{config}") if config and known.folders else (config, None)
    rows = _hub_rows(source, known.name, name, wanted, data_dir=folder, split=split, streaming=streaming)
    yield from _numbered(f"{known.name}/{split}", rows)


def _known(location: str) -> KnownDataset:
    return KNOWN_DATASETS.get(location, KnownDataset(location, ""))


def _hub_rows(source: str, path: str, name: str | None, wanted: Collection[str], **how: Any) -> Iterator[Any]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(f"data source {source} needs datasets ({error}): pip install 'smallcoder_jax[hub]'") from error
    try:
        rows: Any = datasets.load_dataset(path, name, **how)
        names = rows.column_names or ()  # empty for a stream whose columns are known only from its rows
        if any(column in wanted for column in names):
            rows = rows.select_columns([column for column in names if column in wanted])
        for row in rows:
            # Includes the names of all columns, so that an error can list them.
            yield {**dict.fromkeys(names), **{name: without_nulls(cell) for name, cell in row.items()}}
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise UserError(_ways_out(source, error, "HF_HOME")) from error


def _ways_out(source: str, error: Exception, cache: str) -> str:
    cause = str(error).partition("\n")[0]
    mirror = " or HF_ENDPOINT to a mirror" if cache == "HF_HOME" else ""
    return (
        f"data source {source} cannot be read: {type(error).__name__}: {cause}. Three ways out: download it where "
        f"there is a network and use sources=dir:PATH, jsonl:PATH or parquet:PATH; set {cache} to a cache that holds it"
        f"{mirror}; train on this machine's own code with sources=stdlib"
    )


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        mapping = isinstance(row, Mapping)
        yield Row(f"{name}:{number}", row if mapping else {}, "" if mapping else "no columns")


class _Columns:
    """Makes documents from rows. A document's text comes from the columns that `column` joins with `+`, or, where it is
    empty, from the first of `TEXT_COLUMNS` that the row has."""

    def __init__(self, source: str, column: str):
        self._source = source
        self._joined = tuple(column.split("+")) if column else ()
        self._names = self._joined or TEXT_COLUMNS
        self.wanted = (*self._names, *_ABOUT_COLUMNS)
        self._expected = f"column {column}" if column else f"one of the columns {', '.join(TEXT_COLUMNS)}"
        self._expected += "; name the column with ?column=NAME"
        self._account = Account(f"data source {source}", self._expected)
        self._missing = set(self._joined)

    def checked(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows. Raises UserError where the first row, whose columns all rows of a table have, lacks the wanted
        columns."""
        for number, row in enumerate(rows):
            columns = row.columns
            if number == 0 and not (all if self._joined else any)(name in columns for name in self._names):
                found = ", ".join(map(str, columns)) or "none"
                raise UserError(f"data source {self._source}: found the columns {found}; expected {self._expected}")
            yield row

    def documents(self, rows: Iterable[Row]) -> Iterator[Document | Skipped]:
        """A document, or a record of skipping it, for every row. Raises UserError at the end if no row was usable."""
        for row in rows:
            try:
                text = self._text(row)
            except ValueError as error:
                yield Skipped("unreadable", self._account.add_bad(row, str(error)))
                continue
            self._account.add_used()
            yield Skipped("binary", row.place) if "\0" in text else _document(self._source, text, row)
        self._account.check()
        if self._missing and self._account.used:
            names = ", ".join(sorted(self._missing))
            raise UserError(f"data source {self._source}: no row has the column {names}; expected {self._expected}")

    def _text(self, row: Row) -> str:
        """The text of a row. Raises ValueError for a row without any of the columns, or with invalid text in them."""
        if row.problem:
            raise ValueError(row.problem)
        names = [name for name in self._names if name in row.columns]
        if not names:
            raise ValueError(f"no column {' or '.join(self._names)}")
        self._missing.difference_update(names)
        texts = [text for text in (text_of(row.columns[name]) for name in names) if text]
        return "\n\n".join(texts if self._joined else texts[:1])


def _document(source: str, text: str, row: Row) -> Document:
    path = _first(row.columns, _PATH_COLUMNS) or row.place
    language = _first(row.columns, _LANGUAGE_COLUMNS).lower() or language_of(path) or ""
    repository, license_name = (_first(row.columns, names) for names in (_REPOSITORY_COLUMNS, _LICENSE_COLUMNS))
    return Document(text, source, path, repository, language, license_name)


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the columns that is not null, converted to text; the items of a list are sorted."""
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    text = ", ".join(sorted(map(str, value))) if isinstance(value, (list, tuple)) else str(value)
    return valid_text(text)
