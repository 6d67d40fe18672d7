"""A shard that is not the one that was prepared is refused by name: at once, by the reader, or in the background."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.rows.documents import make_train_iterator
from smallcoder_jax.data.tokens import shards, verification
from smallcoder_jax.data.tokens.verification import begin_verification, steps_until_repeated, verify_shards
from smallcoder_jax.tokenizers.bytes import ByteTokenizer


def write(folder: Path, first: int = 3) -> shards.Manifest:
    documents = [(np.arange(n % 50 + 2) + first, n % 50) for n in range(200)]
    source = shards.SourceTokens("stdlib", 1.0, False, documents[:150], documents[150:])
    tokenizer = ByteTokenizer()
    values = {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash, "tokenizer": "../t"}
    return shards.write_tokens(folder, [source], **values)


def flip(path: Path, content: bytes) -> None:
    """A bit of an id: the reader's own checksums notice it."""
    place = content.index(np.arange(3, 40).astype("<u2").tobytes()) + 10
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def flip_padding(path: Path, content: bytes) -> None:
    """A bit between the records: no reader notices it."""
    path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])


def swap(path: Path, content: bytes) -> None:
    """Other tokens, as many, in a file that is sound in itself."""
    write(path.parent / "other", first=4)
    shutil.copy(path.parent / "other" / path.name, path)


@pytest.mark.parametrize("change", [flip, flip_padding, swap])
def test_another_file_is_named(change: Callable[[Path, bytes], None], tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    verify_shards(tmp_path / "t", shards.read_manifest(tmp_path / "t"))
    path = tmp_path / "t" / manifest.sources[0].train.files[0]
    change(path, path.read_bytes())
    again = shards.read_manifest(tmp_path / "t")  # its size is as it was
    with pytest.raises(UserError, match=rf"{path} is damaged or was changed since it was prepared: .* SHA-256"):
        verify_shards(tmp_path / "t", again)


def test_another_size_is_named_at_once(tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    path = tmp_path / "t" / manifest.sources[0].validation.files[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path} has 131,071 bytes, the manifest says 131,072"):
        shards.read_manifest(tmp_path / "t")


def test_a_manifest_without_checksums_vouches_by_its_fingerprint(tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    older = json.loads((tmp_path / "t" / shards.MANIFEST).read_text())
    del older["checksums"]
    (tmp_path / "t" / shards.MANIFEST).write_text(json.dumps(older))
    read = shards.read_manifest(tmp_path / "t")
    assert read == dataclasses.replace(manifest, checksums={})
    verify_shards(tmp_path / "t", read)
    path = tmp_path / "t" / manifest.sources[0].train.files[0]
    good = path.read_bytes()
    swap(path, good)
    with pytest.raises(UserError, match=rf"token shards in {tmp_path / 't'} are not those that were prepared"):
        verify_shards(tmp_path / "t", read)
    flip(path, good)
    with pytest.raises(UserError, match=rf"{path} is damaged: Corrupted"):
        verify_shards(tmp_path / "t", read)


def test_it_is_done_once_in_a_process_and_hurts_whoever_asks(tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    begun = begin_verification(tmp_path / "t", manifest)
    assert begin_verification(tmp_path / "." / "t", manifest) is begun
    begun.wait()
    begun.check()
    assert begun.done
    verification._begun.clear()
    flip(path := tmp_path / "t" / manifest.sources[0].train.files[0], path.read_bytes())
    begun = begin_verification(tmp_path / "t", manifest)
    for ask in (begun.wait, begun.check):
        with pytest.raises(UserError, match="was changed since it was prepared"):
            ask()


def test_a_source_repeats_when_its_share_of_the_steps_is_through(tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    (entry,) = manifest.sources
    tokens = entry.train.tokens
    assert steps_until_repeated(manifest, DataConfig(), tokens // 10) == 10
    light = dataclasses.replace(entry, weight=3.0)
    mixed = dataclasses.replace(manifest, sources=(entry, light))
    assert steps_until_repeated(mixed, DataConfig(), tokens // 12) == 16  # the heavier one, of 3 tokens in 4
    assert steps_until_repeated(manifest, DataConfig(packing="document"), tokens // 10) == 0


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_that_the_reader_finds_is_one_message(workers: int, tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    path = tmp_path / "t" / manifest.sources[0].train.files[0]
    flip(path, path.read_bytes())
    with pytest.raises(UserError, match=rf"{path} is damaged: Corrupted"):
        list(shards.read_records(tmp_path / "t", [path.name], manifest.dtype))
    shape = {"sequence_length": 64, "batch_size": 8, "rows": range(8), "seed": 0}
    data = DataConfig(workers=workers, fim_rate=0.0)
    batches = make_train_iterator(manifest, tmp_path / "t", ByteTokenizer(), data=data, **shape)
    try:
        with pytest.raises(UserError, match=rf"{path} is damaged: Corrupted.* delete {tmp_path / 't'} and run"):
            collections.deque(batches, maxlen=0)
    finally:
        batches.close()


@pytest.mark.parametrize(
    "change",
    [
        {"checksums": []},
        {"checksums": {"x": {}}},
        {"checksums": {"x": {"bytes": 1, "sha256": "0"}}},
        {"fingerprint": ["a"]},
        {"dtype": "float16"},
        {"vocab_size": "300"},
        {"sources": [{"train": 1}]},
        {"sources": None},
        {"sources": "abc"},
    ],
)
def test_a_manifest_of_another_form_is_refused(change: dict, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / shards.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=f"{path} is not a manifest"):
        shards.read_manifest(tmp_path)


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / shards.MANIFEST).mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        shards.read_manifest(tmp_path)
    assert not shards.has_fingerprint(tmp_path / shards.MANIFEST, "0")
