"""Documents from rows: JSON lines, Parquet, TensorFlow Datasets and the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.documents import Document, Skipped
from smallcoder_jax.data.languages import language_of

TEXT_COLUMNS = ("content", "text", "code")
_PATH_COLUMNS = ("path", "max_stars_repo_path", "file_path", "filename", "id")
_REPOSITORY_COLUMNS = ("repo", "repository", "repository_name", "repo_name", "max_stars_repo_name")
_LANGUAGE_COLUMNS = ("lang", "language", "programming_language")
_SWITCH = {"1": True, "true": True, "0": False, "false": False}
_LICENSE_COLUMNS = ("license", "licenses", "max_stars_repo_licenses")


@dataclasses.dataclass(frozen=True)
class KnownDataset:
    """How a data set of the hub is read where the spec says nothing else. `column` may join several with `+`.

    `folders`: the data set has no named configurations but a folder `data/LANGUAGE` for each language.
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
    """One JSON object per line of a file, or of every `.jsonl` file of a folder. A bad line is skipped."""
    for name, rows in jsonl_rows(source, location, options):
        yield from _documents(source, rows, options.get("column"), name)


def read_parquet(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """The rows of a Parquet file, or of every `.parquet` file of a folder."""
    for name, rows in parquet_rows(source, location, options):
        yield from _documents(source, rows, options.get("column"), name)


def jsonl_rows(source: str, location: str, options: Mapping[str, str]) -> Iterator[tuple[str, Iterator[Any]]]:
    """The name of each file, and its rows; None for a line that is not JSON."""
    for path in _files(source, location, ".jsonl"):
        yield path.name, _json_rows(source, path)


def parquet_rows(source: str, location: str, options: Mapping[str, str]) -> Iterator[tuple[str, Iterator[Any]]]:
    """The name of each file, and its rows."""
    for path in _files(source, location, ".parquet"):
        yield path.name, _parquet_rows(source, path)


def read_tfds(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """A split of a data set of TensorFlow Datasets, downloaded and prepared where it is not there yet."""
    import tensorflow_datasets as tfds

    split = options.get("split", "train")
    try:
        builder: Any = tfds.builder(location, file_format="array_record")
        builder.download_and_prepare()
        rows = iter(builder.as_data_source(split))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(_ways_out(source, error, "TFDS_DATA_DIR")) from error
    yield from _documents(source, rows, options.get("column"), f"{location}/{split}")


def read_hugging_face(source: str, location: str, options: Mapping[str, str]) -> Iterator[Document | Skipped]:
    """A split of a data set of the Hugging Face hub. Raises UserError with the cause and three ways out."""
    column = options.get("column", _known(location).column)
    for name, rows in hugging_face_rows(source, location, options):
        yield from _documents(source, rows, column, name)


def hugging_face_rows(source: str, location: str, options: Mapping[str, str]) -> Iterator[tuple[str, Iterator[Any]]]:
    """The name of the split, and its rows, whose reading raises UserError with the cause and three ways out."""
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
    yield (
        f"{known.name}/{split}",
        _hub_rows(source, known.name, name, data_dir=folder, split=split, streaming=streaming),
    )


def _known(location: str) -> KnownDataset:
    return KNOWN_DATASETS.get(location, KnownDataset(location, ""))


def _hub_rows(source: str, path: str, name: str | None, **how: Any) -> Iterator[Any]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(f"data source {source} needs datasets ({error}): pip install 'smallcoder_jax[hub]'") from error
    try:
        yield from datasets.load_dataset(path, name, **how)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(_ways_out(source, error, "HF_HOME")) from error


def _ways_out(source: str, error: Exception, cache: str) -> str:
    cause = str(error).partition("\n")[0]
    mirror = " or HF_ENDPOINT to a mirror" if cache == "HF_HOME" else ""
    return (
        f"data source {source} cannot be read: {type(error).__name__}: {cause}. Three ways out: download it where "
        f"there is a network and use sources=dir:PATH, jsonl:PATH or parquet:PATH; set {cache} to a cache that holds it"
        f"{mirror}; train on this machine's own code with sources=stdlib"
    )


def _files(source: str, location: str, extension: str) -> list[Path]:
    path = Path(location).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"data source {source}: {path} does not exist; give a {extension} file or a folder of them")
    files = sorted(path.glob(f"*{extension}"))
    if not files:
        raise UserError(f"data source {source}: the folder {path} holds no {extension} file; give one that does")
    return files


def _parquet_rows(source: str, path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"data source {source} needs pyarrow ({error}): pip install 'smallcoder_jax[hub]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data source {source}: {path} cannot be read as Parquet: {error}; copy it again") from error


def _json_rows(source: str, path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):  # RecursionError: brackets nested too deep
                        yield None
    except OSError as error:
        raise UserError(f"data source {source}: {path} cannot be read: {error.strerror}; check its rights") from error


def _documents(source: str, rows: Iterable[Any], column: str | None, name: str) -> Iterator[Document | Skipped]:
    columns: tuple[str, ...] = ()
    for number, row in enumerate(rows):
        row_id = f"{name}:{number}"
        if not isinstance(row, Mapping):
            yield Skipped("unreadable", row_id)
            continue
        columns = columns or _text_columns(source, row, column)
        values = [_as_text(row.get(name)) for name in columns]
        text = None if None in values else "\n\n".join(value for value in values if value)
        if text is None:
            yield Skipped("unreadable", row_id)
        elif "\0" in text:
            yield Skipped("binary", row_id)
        else:
            yield _document(source, text, row, row_id)


def _document(source: str, text: str, row: Mapping[str, Any], row_id: str) -> Document:
    path = _first(row, _PATH_COLUMNS) or row_id
    language = _first(row, _LANGUAGE_COLUMNS).lower() or language_of(path) or ""
    return Document(text, source, path, _first(row, _REPOSITORY_COLUMNS), language, _first(row, _LICENSE_COLUMNS))


def _text_columns(source: str, row: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    wanted = tuple(column.split("+")) if column else next(((name,) for name in TEXT_COLUMNS if name in row), ())
    if not wanted or any(name not in row for name in wanted):
        expected = f"column {column}" if column else f"one of the columns {', '.join(TEXT_COLUMNS)}"
        raise UserError(
            f"data source {source}: expected {expected}, found {', '.join(map(str, row)) or 'none'}; name the column "
            "with ?column=NAME"
        )
    return wanted


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if isinstance(value, (list, tuple)):
        return ", ".join(sorted(map(str, value)))
    return str(_as_text(value) or value).encode("utf-8", "backslashreplace").decode("utf-8")


def _as_text(value: Any) -> str | None:
    """A string that UTF-8 can hold, or None: JSON lets half of a surrogate pair through."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")
            return value
    except UnicodeError:
        return None
    return None
