"""A run is whole: what it needs lies in its folder, or is recognised where it lies now."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from smallcoder_jax import loading
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.faults import flip_bit
from smallcoder_jax.base.files import write_json
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer
from smallcoder_jax.tokenizers.sentencepiece import train_sentencepiece
from smallcoder_jax.train.whereabouts import keep_tokenizer, read_tokenizer

TEXTS = [f"def function_{number}(value):\n    return value + {number}\n" for number in range(200)]


def test_a_tokenizer_is_kept_once_and_put_back_where_it_is_damaged(tmp_path: Path) -> None:
    tokenizer, folder = train_sentencepiece(TEXTS, 320, 100_000), RunFolder(tmp_path)
    keep_tokenizer(folder, tokenizer)
    model = folder.tokenizer / "tokenizer.model"
    content, written = model.read_bytes(), model.stat().st_mtime_ns
    keep_tokenizer(folder, load_tokenizer(folder.tokenizer))
    assert model.stat().st_mtime_ns == written
    model.write_bytes(content.replace(b"<|im_end|>", b"<|im_and|>"))
    with pytest.raises(UserError, match=r"tokenizer in .* is not the one that the run was trained with.* put a copy"):
        read_tokenizer(folder, tokenizer.hash)
    for damage in (lambda: None, lambda: flip_bit(folder.tokenizer), lambda: model.write_bytes(b"")):
        damage()
        keep_tokenizer(folder, tokenizer)
        assert model.read_bytes() == content
    assert read_tokenizer(folder, tokenizer.hash)[1] == folder.tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_an_older_run_names_its_tokenizer(tmp_path: Path) -> None:
    tokenizer, folder = ByteTokenizer(), RunFolder(tmp_path / "run")
    tokenizer.save(tmp_path / "elsewhere")
    write_json(folder.run_json, {"tokenizer_folder": str(tmp_path / "elsewhere")})
    assert read_tokenizer(folder, tokenizer.hash)[1] == tmp_path / "elsewhere"
    shutil.move(tmp_path / "elsewhere", tmp_path / "gone")
    with pytest.raises(UserError, match=rf"is gone: .*elsewhere, which run.json names.* as {folder.tokenizer}"):
        read_tokenizer(folder, tokenizer.hash)
    shutil.copytree(tmp_path / "gone", folder.tokenizer)  # what the message says
    assert read_tokenizer(folder, tokenizer.hash)[1] == folder.tokenizer


def write_weights(folder: Path, value: float) -> None:
    save_file({"a": np.full(1, value, np.float32)}, folder / "model.safetensors")


def test_a_model_is_found_beside_a_run_that_moved_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = tmp_path / "new" / "chain" / "language"
    export.mkdir(parents=True)
    write_weights(export, 1.0)
    wanted, run = loading.origin(export)["hash"], tmp_path / "new" / "chain" / "dpo"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    for recorded in ("../language", "runs/chain/language", "/old/machine/chain/language", str(export)):
        assert loading.find_model(run, recorded, wanted, None, "it").resolve() == export
    (tmp_path / "chain" / "language").mkdir(parents=True)  # another, where the first was
    write_weights(tmp_path / "chain" / "language", 2.0)
    assert loading.find_model(run, "chain/language", wanted, None, "it") == export
    write_weights(export, 3.0)
    with pytest.raises(UserError, match=r"it, which has changed: .*chain/language: its hash is"):
        loading.find_model(run, "chain/language", wanted, None, "it")
    with pytest.raises(UserError, match=r"it, which is gone \(.*nowhere"):
        loading.find_model(run, "../nowhere", wanted, None, "it")
