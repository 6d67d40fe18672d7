"""Weights as others publish them: what is read, and what is refused before anything is built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from smallcoder_jax import loading
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.huggingface import read, record, weights
from smallcoder_jax.models import build
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer, open_tokenizer
from tests.huggingface.conftest import CODE

Tensors = dict[str, np.ndarray]
WIDTH, ROWS = 8, 12
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {
    "model_type": "llama",
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def llama() -> Tensors:
    """The tensors of `CONFIG` by their published names, in torch's orientation."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {TABLE: (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(2):
        for name in ("q", "k", "v", "o"):
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.gate_proj.weight"] = shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (16, WIDTH)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (WIDTH, 16)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (WIDTH,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def publish(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def shard(folder: Path, tensors: Tensors) -> Path:
    """Two files, the first with the table, and their index."""
    publish(folder, {}).joinpath("model.safetensors").unlink()
    places = {name: FIRST if name == TABLE else SECOND for name in tensors}
    for file in (FIRST, SECOND):
        safetensors.numpy.save_file({n: v for n, v in tensors.items() if places[n] == file}, folder / file)
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def same(one: build.Params, two: build.Params) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(two) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, one, two))
    )


def params(folder: Path) -> build.Params:
    return read.read_export(folder).params


def test_a_head_that_is_the_table_is_read_and_another_is_refused(tmp_path: Path) -> None:
    tensors = llama()
    plain = params(publish(tmp_path, tensors))
    assert np.array_equal(plain["embed"]["embedding"], tensors[TABLE])
    assert "unembed" not in plain
    with_head = {**tensors, HEAD: tensors[TABLE].copy()}
    assert same(params(publish(tmp_path, with_head)), plain)
    only_head = {HEAD if name == TABLE else name: value for name, value in tensors.items()}
    assert same(params(publish(tmp_path, only_head)), plain)
    for head in (tensors[TABLE] + np.float32(1e-3), tensors[TABLE][:-1].copy()):
        with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*to false"):
            params(publish(tmp_path, {**tensors, HEAD: head}))
    untied = params(publish(tmp_path, with_head, tie_word_embeddings=False))
    assert np.array_equal(untied["unembed"]["kernel"], tensors[TABLE].T)


def test_what_is_computed_and_names_without_the_body_s_prefix(tmp_path: Path) -> None:
    tensors = llama()
    plain = params(publish(tmp_path, tensors))
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(2)}
    assert same(params(publish(tmp_path, tensors | frequencies)), plain)
    bare = {name.removeprefix("model."): value for name, value in (tensors | frequencies).items()}
    assert same(params(publish(tmp_path, bare)), plain)
    with pytest.raises(UserError, match=r"holds model\.layers\.0\.self_attn\.inv_freq, which no llama"):
        params(publish(tmp_path, {**tensors, "model.layers.0.self_attn.inv_freq": np.ones(2, np.float32)}))


def test_weights_in_several_files(tmp_path: Path) -> None:
    tensors = llama()
    plain = params(publish(tmp_path / "one", tensors))
    folder = shard(tmp_path / "several", tensors)
    assert same(params(folder), plain)
    (tmp_path / "blobs").mkdir()
    (folder / FIRST).rename(tmp_path / "blobs" / "0a1b")  # as a download's cache keeps them
    (folder / FIRST).symlink_to(tmp_path / "blobs" / "0a1b")
    assert same(params(folder), plain)
    before = loading.origin(folder)
    assert before["step"] is None
    tensors[TABLE][0] += 1
    assert loading.origin(shard(folder, tensors))["hash"] != before["hash"]


def write_index(folder: Path, **places: str) -> None:
    index = json.loads((folder / weights.INDEX).read_text())
    index["weight_map"].update({name.replace("__", "."): file for name, file in places.items()})
    (folder / weights.INDEX).write_text(json.dumps(index))


def change_first(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = safetensors.numpy.load_file(folder / FIRST)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / FIRST)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda f: (f / FIRST).unlink(),
            r"00001-of-00002\.safetensors does not exist, which model\.safetensors\.index",
        ),
        (
            lambda f: change_first(f, lambda t: t.update({NORM: t[TABLE]})),
            "norm.weight is in model-00001.* and model-000",
        ),
        (
            lambda f: change_first(f, lambda t: t.update(x=t[TABLE])),
            r"00001-of-00002\.safetensors holds x, which .*list",
        ),
        (lambda f: write_index(f, model__norm__weight=FIRST), f"says that {NORM} is in {FIRST}, but it is in {SECOND}"),
        (lambda f: write_index(f, lm_head__weight=FIRST), f"says that {HEAD} is in {FIRST}, but no file holds it"),
        (lambda f: write_index(f, a="../x.safetensors"), r"a is in '\.\./x\.safetensors'; expected the name of a"),
        (lambda f: write_index(f, a="/etc/x.safetensors"), "expected the name of a .safetensors file there"),
        (lambda f: write_index(f, a=".."), "expected the name of a .safetensors file there"),
        (lambda f: write_index(f, a="x.bin"), "expected the name of a .safetensors file there"),
        (lambda f: write_index(f, a="\0.safetensors"), "cannot be read"),
        (lambda f: (f / weights.INDEX).write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / weights.INDEX).write_text('{"weight_map": [1]}'), "has no weight_map"),
        (lambda f: (f / weights.INDEX).write_text('{"weight_map": {"a": 1}}'), "says that a is in 1; expected"),
    ],
)
def test_an_index_that_is_not_true(damage: Callable[[Path], Any], complaint: str, tmp_path: Path) -> None:
    folder = shard(tmp_path, llama())
    damage(folder)
    with pytest.raises(UserError, match=complaint):
        params(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", weights.INDEX, FIRST])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_file_is_not_opened(name: str, kind: str, tmp_path: Path) -> None:
    folder = shard(tmp_path, llama()) if name in (weights.INDEX, FIRST) else publish(tmp_path, llama())
    (folder / name).unlink()
    if kind == "device":
        (folder / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read.*it is a {kind}"):
        params(folder)
    if name != "config.json":
        with pytest.raises(UserError, match=rf"{name} cannot be read.*it is a {kind}"):
            loading.origin(folder)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"num_hidden_layers": 9_000}, r"says 9,000 layers, but .* holds 20 tensors in all"),
        ({"num_hidden_layers": 20_000}, r"config\.json: .*layers=20000 must be at most"),
        ({"head_dim": 2**30}, r"shape \(8, 8\); expected \(2147483648, 8\)"),
        ({"num_attention_heads": 2**31}, "num_attention_heads is 2147483648; expected at least 1 and at most"),
        ({"vocab_size": 2**31 - 1}, r"embed_tokens.weight has shape \(12, 8\); expected \(2147483647, 8\)"),
        ({"max_position_embeddings": 10**400}, r"max_position_embeddings is 10{199}\.\.\.; expected"),
        ({"rope_theta": 10**400}, r"rope_theta is 10{199}\.\.\.; expected at least 0"),
        ({"rope_parameters": {"rope_theta": 10**400}}, r"rope_theta is 10{199}\.\.\.; expected at least 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; expected at least 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; expected at least 0"),
        ({"rope_scaling": {"type": ["x"]}}, "rope_scaling is .*supported"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported"),
        ({"hidden_act": {"a": 1}}, "hidden_act is .*; supported: 'silu'"),
        ({"hidden_act": "x" * 9999}, r"hidden_act is 'x{199}\.\.\.; supported"),
    ],
)
def test_config_is_compared_with_the_file_before_anything_is_built(
    config: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "abstract_model", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=complaint):
        params(publish(tmp_path, llama(), **config))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"rope_theta": 1e999}', '{"a": NaN}', "9" * 5000, ""]
)
def test_config_that_is_no_json(text: str, tmp_path: Path) -> None:
    publish(tmp_path, llama())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        params(tmp_path)


def test_a_folder_with_several_files_is_loaded(tmp_path: Path) -> None:
    tensors = llama()
    tensors[TABLE] = np.resize(tensors[TABLE], (256, WIDTH))
    folder = shard(tmp_path, tensors)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 256}))
    ByteTokenizer().save(folder)
    loaded = loading.load(folder)
    assert loaded.tokenizer.encode(CODE[:3]) == list(CODE[:3].encode())
    with pytest.raises(UserError, match="is an exported folder: it has no steps"):
        loading.load(folder, step=1)


@pytest.mark.parametrize("name", ["a" * 10_000, "loop", "\udcff", "a" * 300])
def test_paths_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = tmp_path / name
    with pytest.raises(UserError, match=r"does not exist|cannot be read"):
        loading.load(folder)
    with pytest.raises(UserError, match=r"does not exist|cannot be read"):
        read.read_export(folder)
    with pytest.raises(UserError, match=r"has no export\.json"):
        record.read(folder)
    with pytest.raises(UserError, match="is no tokenizer's folder"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match="cannot be loaded"):
        open_tokenizer("hf", str(folder))
