import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.tokens import shards


def write(folder: Path, vocab_size: int = 300, **changes: object) -> shards.Manifest:
    documents = [(np.arange(n % 50 + 2), n % 50) for n in range(200)]
    source = shards.SourceTokens("stdlib", 1.0, True, documents[:150], documents[150:])
    source = dataclasses.replace(source, **changes)
    return shards.write_tokens(folder, [source], vocab_size=vocab_size, tokenizer_hash="h", tokenizer="../t")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_records_come_back_in_order(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    manifest = write(tmp_path / "t", vocab_size)
    assert shards.read_manifest(tmp_path / "t") == manifest
    assert manifest.dtype == dtype
    train = manifest.sources[0].train
    records = list(shards.read_records(tmp_path / "t", train.files, manifest.dtype))
    assert [len(ids) for ids in records] == [n % 50 + 2 for n in range(150)]
    assert all(ids.dtype == np.dtype(dtype).newbyteorder("<") for ids in records)
    assert (train.documents, train.tokens) == (150, sum(map(len, records)))


def test_fingerprint_depends_on_content_not_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    second = write(tmp_path / "b")
    assert len(second.sources[0].train.files) > len(first.sources[0].train.files)
    assert second.fingerprint == first.fingerprint
    assert shards.compute_fingerprint(tmp_path / "b", second) == first.fingerprint
    assert write(tmp_path / "c", train=[([1, 2], 0)]).fingerprint != first.fingerprint
    assert write(tmp_path / "d", weight=2.0).fingerprint != first.fingerprint


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 300"):
        write(tmp_path / "t", train=[([1, 300], 0)])
    assert not (tmp_path / "t" / shards.MANIFEST).exists()


def test_damaged_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        shards.read_manifest(tmp_path)
    manifest = write(tmp_path / "t")
    path = tmp_path / "t" / shards.MANIFEST
    good = path.read_text()
    path.write_text(good[: len(good) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        shards.read_manifest(tmp_path / "t")
    path.write_text(json.dumps({**json.loads(good), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        shards.read_manifest(tmp_path / "t")
    path.write_text(good.replace("000-train-00000.array_record", "../elsewhere.array_record"))
    with pytest.raises(UserError, match="outside its folder"):
        shards.read_manifest(tmp_path / "t")
    path.write_text(good)
    (tmp_path / "t" / manifest.sources[0].train.files[0]).unlink()
    with pytest.raises(UserError, match="named by the manifest but does not exist"):
        shards.read_manifest(tmp_path / "t")
