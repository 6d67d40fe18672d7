"""An exported folder is the model it was made from, as transformers sees it; and the check notices when it is not."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.huggingface import parity, write
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.huggingface.conftest import MODELS, gpt2, llama, random_params

QUICK = (1, 7)


def export(folder: Path, model: Any, tokenizer: Tokenizer, **options: Any) -> Any:
    params = random_params(model)
    write.write_export(folder, model=model, params=params, tokenizer=tokenizer, card={"name": "x"}, **options)
    return params


@pytest.mark.parametrize("name", MODELS)
def test_transformers_agrees(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = MODELS[name]
    params = export(tmp_path / "out", model, tokenizer)
    report = parity.check(tmp_path / "out", model, params, tokenizer, texts=["if x:\n\tpass\r\n"], lengths=(1, 7, 512))
    assert report.passed
    assert report.lengths == (1, 7, model.context)
    assert report.largest_difference < 1e-4
    names = [check.name for check in report.checks]
    assert {"logits: padded left", "logits: padded right", "token ids of texts", "chat template"} <= set(names)
    assert report.greedy_tokens == min(64, model.context // 2)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize("tools", [False, True])
def test_bytes_agree(tools: bool, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(tools=tools)
    model = llama(vocab_size=tokenizer.vocab_size, context=32)
    params = export(tmp_path / "out", model, tokenizer)
    assert parity.check(tmp_path / "out", model, params, tokenizer, lengths=QUICK).passed


def test_bfloat16_is_compared_with_what_was_stored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = llama(context=32)
    params = export(tmp_path / "out", model, tokenizer, dtype="bfloat16")
    rounded = write.stored_params(model, params, "bfloat16")
    assert parity.check(tmp_path / "out", model, rounded, tokenizer, lengths=QUICK).passed
    with pytest.raises(CheckFailed, match=r"logits.*FAILED"):
        parity.check(tmp_path / "out", model, params, tokenizer, lengths=QUICK)


def drop_theta(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"], content["rope_theta"]
    path.write_text(json.dumps(content))


def swap_gate_and_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def lose_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def convert_with_transformers(folder: Path) -> None:
    """Without tokenizer.json, transformers converts tokenizer.model, and reads U+2581 as a space."""
    (folder / "tokenizer.json").unlink()


def lose_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-20]
    path.write_text(json.dumps(content))


def lose_chat_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\\n", "<|im_end|>"))


def lose_beginning(folder: Path) -> None:
    change_tokenizer(folder, post_processor=None)


def lose_decoder(folder: Path) -> None:
    change_tokenizer(folder, decoder=None)


def change_tokenizer(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop_theta, r"logits: 7 tokens .* FAILED"),
        (swap_gate_and_up, r"logits: 1 tokens .* FAILED"),
        (lose_a_tensor, r"missing: model.norm.weight"),
        (convert_with_transformers, r"token ids of texts .* FAILED"),
        (lose_merges, r"token ids of texts .* FAILED"),
        (lose_chat_template, r"chat template .* FAILED"),
        (lose_beginning, r"special pieces .* not beginning in front of a text .* FAILED"),
        (lose_decoder, r"text of token ids .* FAILED"),
    ],
)
def test_damage_is_noticed(damage: Any, complaint: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, model = tmp_path / "out", llama(context=32)
    params = export(folder, model, tokenizer)
    damage(folder)
    with pytest.raises(CheckFailed, match=complaint):
        parity.check(folder, model, params, tokenizer, lengths=QUICK)


def test_other_weights_write_other_greedy_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = llama(context=32)
    export(tmp_path / "out", model, tokenizer)
    with pytest.raises(CheckFailed, match=r"greedy after .* FAILED"):
        parity.check(tmp_path / "out", model, random_params(model, seed=5), tokenizer, lengths=QUICK)


def test_a_failed_check_leaves_what_was_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, model = tmp_path / "out", llama(context=32)
    export(folder, model, tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = random_params(model, seed=9)

    def check(written: Path) -> Any:
        raise CheckFailed(f"no good: {sorted(path.name for path in written.iterdir())}")

    with pytest.raises(CheckFailed, match=r"model\.safetensors"):
        write.write_export(folder, model=model, params=other, tokenizer=tokenizer, card={"name": "y"}, check=check)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nan_fails(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = llama(context=32)
    params = random_params(model)
    params["final_norm"]["scale"] = np.full(64, np.nan, np.float32)
    write.write_export(tmp_path / "out", model=model, params=params, tokenizer=tokenizer, card={"name": "x"})
    with pytest.raises(CheckFailed, match=r"logits: 1 tokens +inf"):
        parity.check(tmp_path / "out", model, params, tokenizer, lengths=QUICK)


def test_without_torch_the_extra_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'smallcoder_jax\[parity\]'"):
        parity.check(tmp_path, gpt2(), {}, tokenizer)


def test_report_shows_every_line() -> None:
    checks = (parity.Check("a", "1", "2", True), parity.Check("longer name", "3", "4", False))
    report = parity.ParityReport(checks, 1e-4, (1,), 2, 64, 0.5, {"torch": "2"})
    assert not report.passed
    assert report.table().splitlines()[2] == "longer name  3      4        FAILED"
    assert report.record() == {"checked": True, "tolerance": 1e-4, "lengths": [1], "texts": 2, "greedy_tokens": 64}
    assert dataclasses.asdict(report)["checks"][1]["passed"] is False
