"""The TFDS builder that stores a corpus. Importing this module imports tensorflow_datasets, but not TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import MAX_RECORD_BYTES, open_regular, read_regular, reason
from smallcoder_jax.data.sources.document import Document

_FIELDS = ("text", "source", "path", "repository", "language", "license")
_READ_AHEAD = 256


class CodeCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of documents with provenance, in the order in which they are given."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict[str, Any]] = {}  # nothing is downloaded, so that no checksums are needed

    def __init__(self, splits: dict[str, Callable[[], Iterator[Document]]], data_dir: str):
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in (*_FIELDS, "hash")})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # everything is on this machine already
        return {split: self._generate_examples(documents) for split, documents in self._splits.items()}

    def _generate_examples(self, documents: Callable[[], Iterator[Document]]) -> Iterator[tuple[int, dict[str, str]]]:
        for number, document in enumerate(documents()):
            yield number, {**dataclasses.asdict(document), "hash": document.hash}


def store(folder: Path, splits: dict[str, Callable[[], Iterator[Document]]]) -> None:
    """Writes the documents of every split as a TFDS data set in `folder`."""
    tfds.disable_progress_bar()
    builder: Any = CodeCorpus(splits, str(folder))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints temporary paths
        builder.download_and_prepare()
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def count(info: Path, split: str) -> int:
    """The number of documents of a split; `info` is the data set's `dataset_info.json`. Raises UserError for damage."""
    with _damage_named(info.parent):
        return len(_open(info.parent, split))


def load_range(info: Path, split: str, start: int, stop: int) -> Iterator[Document]:
    """The documents `start` to `stop` - 1 of a split; `info` is the data set's `dataset_info.json`. Raises UserError
    for damage."""
    with _damage_named(info.parent):
        records = _open(info.parent, split)
    for first in range(start, stop, _READ_AHEAD):
        with _damage_named(info.parent):
            found = records.__getitems__(list(range(first, min(first + _READ_AHEAD, stop))))
            documents = [Document(**{name: record[name].decode("utf-8") for name in _FIELDS}) for record in found]
        yield from documents


def _open(folder: Path, split: str) -> Any:
    for path in folder.iterdir():  # the library would wait for a pipe, and would read a JSON file of any size
        if path.suffix == ".json":
            read_regular(path, MAX_RECORD_BYTES)
        else:
            open_regular(path).close()
    builder: Any = tfds.builder_from_directory(folder)
    return builder.as_data_source(split)


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ImportError, MemoryError):  # problems of this machine, not of the files
        raise
    except Exception as error:  # for damaged files the libraries raise all kinds of exceptions
        raise UserError(
            f"the corpus in {folder} is damaged: {reason(error)}. Delete {folder.parents[1]} and prepare the data again"
        ) from error
