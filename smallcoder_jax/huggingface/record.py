"""`export.json`: the inputs that a folder was written from, and checksums to detect damage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from smallcoder_jax.base.checksums import check_file, checksums_of, is_checksum
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object, write_json

RECORD, CARD, GENERATION_CONFIG = "export.json", "README.md", "generation_config.json"
FORMAT = 1
Dtype = Literal["float32", "bfloat16"]
Weights = Literal["float", "packed"]  # whether ternary kernels are packed
# Files without a checksum, because people edit them: they do not affect what the model computes.
_EDITED = (RECORD, CARD, GENERATION_CONFIG, "chat_template.jinja")


class Record(NamedTuple):
    """The inputs of `write_export` other than the model. With them, the same folder can be written again."""

    card: dict[str, Any]
    dtype: Dtype
    weights: Weights = "float"


def write(folder: Path, record: Record) -> None:
    """Writes the record of `folder`, with the checksums of the files that are in it."""
    files = sorted(path for path in folder.iterdir() if path.name not in _EDITED)
    checksums = checksums_of(folder, (path.name for path in files))
    content = {"format": FORMAT, "dtype": record.dtype, "card": record.card, "checksums": checksums}
    if record.weights != "float":  # as in records from before there was a choice
        content["weights"] = record.weights
    write_json(folder / RECORD, content)


def read(folder: Path) -> Record:
    """The record of `folder`. Raises UserError for a folder that this package did not write."""
    if not os.path.exists(folder / RECORD):
        raise UserError(
            f"{folder} has no {RECORD}: it was not written by tools.export, so what its model card should say is not "
            "known; name the run that the model comes from"
        )
    content = _content(folder)
    return Record(content["card"], content["dtype"], content.get("weights", "float"))


def verify(folder: Path) -> None:
    """Raises UserError when a file of an export differs from the one that was written.

    Folders that others published have no record, and old records have no checksums. For them nothing is checked.
    """
    if not os.path.exists(folder / RECORD):
        return
    for name, expected in _content(folder).get("checksums", {}).items():
        again = f"Export or copy it again; if the change is meant, delete {RECORD}"
        check_file(folder / name, expected, "the export", again)


def _content(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    content = read_json_object(path, "the record of an export; export the model again, or delete it")
    if content.get("format") != FORMAT or content.get("dtype") not in get_args(Dtype):
        raise UserError(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}")
    if content.get("weights", "float") not in get_args(Weights):
        raise UserError(f"{path} has weights {content['weights']!r}; expected one of {', '.join(get_args(Weights))}")
    checksums = content.get("checksums", {})
    if not isinstance(checksums, dict) or not all(
        is_checksum(value) and Path(name).name == name for name, value in checksums.items()
    ):
        raise UserError(f"{path} holds no checksums by file of this folder; export the model again, or delete it")
    if fault := _fault(content.get("card")):
        raise UserError(f"{path} holds no model card: {fault}. Export the model again from its run")
    return content


def _fault(card: Any) -> str:
    """The first part of a card that is not as `huggingface.card` describes it; empty when all is."""
    if not isinstance(card, dict) or not isinstance(card.get("name"), str):
        return "it has no name"
    tables = {key: card.get(key) or {} for key in ("training", "evaluation", "data", "parity")}
    if wrong := [key for key, table in tables.items() if not isinstance(table, Mapping)]:
        return f"{wrong[0]} is no object"
    sources, licenses = tables["data"].get("sources", []), tables["data"].get("licenses", {})
    if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
        return "data.sources is no list of objects"
    return "" if isinstance(licenses, Mapping) else "data.licenses is no object"
