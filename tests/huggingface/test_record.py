"""The record of an export: damage is seen, and a record that is none is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.huggingface import read, record, write
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.huggingface.conftest import llama, random_params

CARD: dict[str, Any] = {
    "name": "x",
    "training": {"steps": 1},
    "data": {"sources": [{"spec": "stdlib"}], "licenses": {}},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("exported") / "out", llama(vocab_size=256)
    write.write_export(folder, model=model, params=random_params(model), tokenizer=ByteTokenizer(), card=CARD)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "out")


def test_a_flipped_exponent_is_seen(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40  # of a float32
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or was changed since the export"):
        read.read_export(folder)
    (folder / record.RECORD).unlink()  # as of somebody who publishes none
    read.read_export(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer_kind.json"])
def test_every_file_that_decides_something_is_compared(name: str, folder: Path) -> None:
    with (folder / name).open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=rf"{name} is damaged or was changed since the export"):
        read.read_export(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read: .*; it was there at the export"):
        read.read_export(folder)


def test_what_is_edited_by_hand_is_not(folder: Path) -> None:
    for name in ("README.md", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text("mine")
    assert read.read_export(folder).model.layers > 0


def change(folder: Path, **values: Any) -> None:
    path = folder / record.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_record_from_before_there_were_checksums(folder: Path) -> None:
    change(folder, checksums={})
    content = json.loads((folder / record.RECORD).read_text())
    del content["checksums"]
    (folder / record.RECORD).write_text(json.dumps(content))
    model, params, _ = read.read_export(folder)
    assert record.read(folder) == record.Record(CARD, "float32")
    assert model == llama(vocab_size=256)
    assert np.isfinite(params["embed"]["embedding"]).all()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"checksums": []}, "holds no checksums by file of this folder"),
        ({"checksums": {"../x": "0"}}, "holds no checksums by file of this folder"),
        (
            {"checksums": {"..": {"bytes": 0, "sha256": "0"}}},
            "is damaged or was changed|cannot be read: it is a folder",
        ),
        ({"checksums": {"\0": {"bytes": 0, "sha256": "0"}}}, "cannot be read"),
        ({"checksums": {"config.json": 5}}, "holds no checksums by file of this folder"),
        ({"checksums": {"config.json": {"bytes": 5, "sha256": "0"}}}, "config.json is damaged or was changed"),
        ({"format": 9}, "has format 9; this version reads format 1"),
        ({"format": [1]}, r"has format \[1\]"),
        ({"dtype": ["float32"]}, "this version reads format 1"),
        ({"card": None}, "holds no model card: it has no name"),
        ({"card": {"name": 5}}, "holds no model card: it has no name"),
        ({"card": {"name": "x", "training": "y"}}, "training is no object"),
        ({"card": {"name": "x", "data": ["y"]}}, "data is no object"),
        ({"card": {"name": "x", "data": {"sources": {"a": 1}}}}, "data.sources is no list of objects"),
        ({"card": {"name": "x", "data": {"sources": [1]}}}, "data.sources is no list of objects"),
        ({"card": {"name": "x", "data": {"licenses": [1]}}}, "data.licenses is no object"),
    ],
)
def test_a_record_that_is_none(values: dict[str, Any], complaint: str, folder: Path) -> None:
    change(folder, **values)
    for reader in (record.verify, read.read_export):
        with pytest.raises(UserError, match=complaint):
            reader(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"format": NaN}'])
def test_a_record_that_is_no_json(text: str, folder: Path) -> None:
    (folder / record.RECORD).write_text(text)
    with pytest.raises(UserError, match=r"export\.json"):
        record.read(folder)


def test_a_record_that_is_no_file(folder: Path) -> None:
    (folder / record.RECORD).unlink()
    (folder / record.RECORD).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"export\.json cannot be read \(it is a device"):
        read.read_export(folder)
