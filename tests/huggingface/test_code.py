"""Models that transformers does not have: their exports bring their code, and it computes what the model here does."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import smallcoder_jax
from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.config import HnetConfig
from smallcoder_jax.huggingface import parity, reference, write
from smallcoder_jax.huggingface.double import in_float64
from smallcoder_jax.huggingface.read import read_export
from smallcoder_jax.models import build
from smallcoder_jax.models.families import published
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.helpers import FLOAT32
from tests.huggingface.hnet_models import FLAT, MIXED, made

DEEP = dataclasses.replace(
    MIXED, inner_widths=(16, 24), encoder_blocks=(1, 2), decoder_blocks=(1, 1), ternary=(), conv="separate", window=0
)
CODE = {f"{part}_smallcoder_hnet.py" for part in ("configuration", "layers", "modeling")}


def export(folder: Path, model: HnetConfig, **options: Any) -> build.Params:
    params = write.stored_params(model, made(model), "float32", options.get("packing", "float"))
    given: dict[str, Any] = {"card": {"name": "x"}, **options}
    write.write_export(folder, model=model, params=params, tokenizer=ByteTokenizer(), **given)
    return params


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "out"
    export(folder, MIXED)
    return folder


@pytest.fixture
def folder(mixed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(mixed, tmp_path / "out")


@pytest.fixture(scope="module")
def theirs(mixed: Path) -> Any:
    """The exported model in PyTorch, in float64."""
    return reference.load(mixed, MIXED, transformers, torch)[0]


def agrees(folder: Path, model: HnetConfig, **options: Any) -> parity.ParityReport:
    params = export(folder, model, **options)
    return parity.check(folder, model, params, ByteTokenizer(), lengths=(7,))


def test_flat_and_packed_it_agrees(tmp_path: Path) -> None:
    report = agrees(tmp_path / "out", FLAT, packing="packed")
    assert report.passed
    assert report.tolerance == parity.TOLERANCE_64
    assert report.largest_difference < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "packing"),
    [
        (MIXED, "float"),
        (MIXED, "packed"),
        (DEEP, "packed"),
        (dataclasses.replace(FLAT, ternary=(False,), pattern="a"), "float"),
        (dataclasses.replace(MIXED, inner_widths=(16,), pattern="ax", kv_heads=2), "float"),
    ],
)
def test_with_every_part_it_agrees(model: HnetConfig, packing: str, tmp_path: Path) -> None:
    report = agrees(tmp_path / "out", model, packing=packing)
    assert report.passed
    assert report.largest_difference < 1e-12
    compared = [check.name for check in report.checks if check.name.startswith("boundaries")]
    assert len(compared) == (3 if model.inner_widths else 0)


@pytest.mark.slow
def test_borders_that_are_almost_certain_agree(tmp_path: Path) -> None:
    """The share of a chunk has a bound just below 1, which the router of other tests does not reach."""
    params = made(MIXED)
    params["stage"]["encoder"]["final_norm"]["scale"] = np.array([1e3, *[1.0] * 15], np.float32)
    params["stage"]["router"] = {"query": -np.eye(16, dtype=np.float32), "key": np.eye(16, dtype=np.float32)}
    write.write_export(tmp_path / "out", model=MIXED, params=params, tokenizer=ByteTokenizer(), card={"name": "x"})
    theirs = reference.load(tmp_path / "out", MIXED, transformers, torch)[0]
    found = []
    theirs.stage.router.register_forward_hook(lambda _, __, probability: found.append(probability[:, 1:]))
    logits(theirs, [list(b"def f(x):")])
    assert float(found[0].max()) > 1 - 1e-4
    assert parity.check(tmp_path / "out", MIXED, params, ByteTokenizer(), lengths=(7,)).passed


@pytest.mark.parametrize("model", [FLAT, MIXED, DEEP])
def test_every_parameter_has_its_shape(model: HnetConfig) -> None:
    shapes = jax.tree_util.tree_leaves_with_path(build.abstract_model(model, FLOAT32)[1])
    found = {tuple(getattr(entry, "key", None) for entry in path): leaf.shape for path, leaf in shapes}
    assert published(model).shapes(model) == found
    tensors = published(model).tensors(model)
    assert sorted(map(str, found)) == sorted(str(path) for tensor in tensors for path in tensor.ours)


def test_mistakes_in_the_code_or_weights_are_noticed(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"boundaries: 7 tokens .* FAILED"):
        parity.check(mixed, MIXED, made(MIXED, seed=3), ByteTokenizer(), lengths=(7,))


def logits(theirs: Any, ids: Any, **options: Any) -> Any:
    with torch.inference_mode():
        return theirs(input_ids=torch.as_tensor(ids), **options)


def test_a_row_does_not_depend_on_where_it_is_cut(theirs: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 245, (2, 24))
    whole = logits(theirs, ids).logits
    first = logits(theirs, ids[:, :9], use_cache=True)
    second = logits(theirs, ids[:, 9:10], state=first.state, use_cache=True)
    third = logits(theirs, ids[:, 10:], state=second.state)
    parts = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_generation_with_its_state_is_that_of_whole_rows(theirs: Any) -> None:
    """Two prompts of unequal length in one batch, each continued as if it were alone and read anew for every byte."""
    prompts = [b"def f(x):", b"if"]
    ids = torch.full((2, 9), 253)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :] = torch.tensor(list(prompt))
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 253, "eos_token_id": None}
    theirs.generation_config = transformers.GenerationConfig(**greedy)
    together = theirs.generate(input_ids=ids, attention_mask=(ids != 253).long())
    for row, prompt in enumerate(prompts):
        alone = theirs.generate(input_ids=torch.tensor([list(prompt)]), use_cache=False)
        assert together[row, 9:].tolist() == alone[0, len(prompt) :].tolist()
    beams = theirs.generate(input_ids=ids, attention_mask=(ids != 253).long(), num_beams=2)
    assert beams.shape == together.shape


def test_the_stage_within_advances_only_where_a_chunk_begins(theirs: Any) -> None:
    counted = []
    handle = theirs.stage.inner.register_forward_hook(lambda *_: counted.append(1))
    output, begun = None, 0
    try:
        for value in b"def f(x):\n    return x":
            state = output.state if output else None
            output = logits(theirs, [[value]], state=state, use_cache=True)
            begun += int(output.boundaries[0].sum())
    finally:
        handle.remove()
    assert len(counted) == begun
    assert 0 < begun < 22
    # The state has a constant size: it holds no more of a text than the window of attention.
    attended = output.state.parts["stage"]["inner"]["stack"][1]["keys"]
    assert attended.shape[1] == MIXED.window


def test_it_does_not_train(theirs: Any) -> None:
    theirs.train()
    try:
        with pytest.raises(ValueError, match="this code does not train"):
            theirs(input_ids=torch.tensor([[1]]))
    finally:
        theirs.eval()


def test_float32_differs_by_no_more_than_rounding_does(theirs: Any, mixed: Path) -> None:
    """A dtype that is too narrow somewhere would show: the median differs as little as in any float32 program."""
    ids = np.random.default_rng(1).integers(0, 245, (4, 16))
    exact = logits(theirs, ids).logits
    single = logits(reference.load(mixed, MIXED, transformers, torch)[0].float(), ids).logits
    assert single.dtype == torch.float32
    assert float((single - exact).abs().median()) < 1e-5


@pytest.mark.slow
def test_at_the_published_flat_shape_float32_cannot_tell(tmp_path: Path) -> None:
    """Why such models are compared in float64. Both float32 programs are as far from the float64 result as from each
    other, and much further than the tolerance of other families; in float64, the two programs are the same."""
    model = HnetConfig(width=512, blocks=6, context=256)
    params = export(tmp_path / "out", model)
    ids = np.frombuffer(Path(parity.__file__).read_bytes()[:256], np.uint8)[None]
    inputs = (ids.astype(np.int32), np.arange(256, dtype=np.int32)[None], np.ones((1, 256), np.int32))
    outputs = functools.partial(parity._outputs, model)
    ours, ours_64 = (np.asarray(forward(params, *inputs)[0]) for forward in (jax.jit(outputs), in_float64(outputs)))
    theirs = reference.load(tmp_path / "out", model, transformers, torch)[0]
    theirs_64 = logits(theirs, ids.astype(np.int64)).logits.numpy()
    theirs_32 = logits(theirs.float(), ids.astype(np.int64)).logits.numpy()
    largest = {
        "float64": np.abs(theirs_64 - ours_64).max(),
        "float32": np.abs(theirs_32 - ours).max(),
        "ours to float64": np.abs(ours - ours_64).max(),
        "theirs to float64": np.abs(theirs_32 - theirs_64).max(),
        "spread of the logits": ours_64.std(),
    }
    print({name: f"{value:.2g}" for name, value in largest.items()})
    assert largest["float64"] < 1e-12
    assert largest["float32"] > 10 * parity.TOLERANCE
    assert largest["theirs to float64"] < 3 * largest["ours to float64"]
    sizes = [(tmp_path / "out" / "model.safetensors").stat().st_size]
    export(tmp_path / "out", model, packing="packed")
    sizes.append((tmp_path / "out" / "model.safetensors").stat().st_size)
    print({"bytes of the float export, and packed": sizes})
    assert sizes[1] < sizes[0] / 10
    packed = jax.jit(outputs)(read_export(tmp_path / "out").params, *inputs)[0]
    np.testing.assert_array_equal(np.asarray(packed), ours)


def test_the_loss_of_labels(theirs: Any) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    output = logits(theirs, ids, labels=torch.tensor([[1, 2, -100, 4]]))
    chances = output.logits.log_softmax(dim=-1)[0]
    torch.testing.assert_close(output.loss, -(chances[0, 2] + chances[2, 4]) / 2)


def test_the_folder(mixed: Path) -> None:
    assert {path.name for path in mixed.glob("*.py")} == CODE
    export = read_export(mixed)
    assert export.model == MIXED
    for mine, stored in zip(jax.tree.leaves(made(MIXED)), jax.tree.leaves(export.params), strict=True):
        np.testing.assert_array_equal(stored, mine)
    card = (mixed / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert "`configuration_smallcoder_hnet.py`, `layers_smallcoder_hnet.py`, `modeling_smallcoder_hnet.py`" in card
    assert "No remote code is needed" not in card


def test_the_same_bytes_twice(mixed: Path, tmp_path: Path) -> None:
    export(tmp_path / "again", MIXED)
    contents = [{path.name: path.read_bytes() for path in each.iterdir()} for each in (mixed, tmp_path / "again")]
    assert contents[0] == contents[1]


def test_it_generates_here(mixed: Path) -> None:
    loaded = smallcoder_jax.load(mixed)
    assert len(loaded.generate("x", max_tokens=4, temperature=0.0)[0].token_ids) <= 4


def edit_code(folder: Path) -> str:
    path = folder / "layers_smallcoder_hnet.py"
    path.write_text(path.read_text() + "\nprint('hello')\n")
    return path.name


def add_code(folder: Path) -> str:
    (folder / "more.py").write_text("")
    return "more.py"


def name_other_code(folder: Path) -> str:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["auto_map"]["AutoConfig"] = "somebody/else--configuration.Config"
    path.write_text(json.dumps(content))
    return path.name


def name_code_of_a_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    return path.name


@pytest.mark.parametrize("change", [edit_code, add_code, name_other_code, name_code_of_a_tokenizer])
def test_only_our_own_code_is_executed(change: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def executed(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers was asked to load it")

    name = change(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", executed)
    with pytest.raises(CheckFailed, match=rf"{name} is not the code that this program exports"):
        parity.check(folder, MIXED, made(MIXED), ByteTokenizer())


def test_code_that_was_edited_is_seen_when_the_folder_is_read(folder: Path) -> None:
    name = edit_code(folder)
    with pytest.raises(UserError, match=rf"{name} is damaged or was changed since the export"):
        read_export(folder)
    (folder / "export.json").unlink()  # whoever means the change, deletes the record: nothing is executed here
    assert read_export(folder).model == MIXED


def test_the_check_leaves_no_module_behind(theirs: Any) -> None:
    assert theirs.__class__.__module__.startswith("transformers_modules.")
    assert not [name for name in sys.modules if name.startswith("transformers_modules.out")]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("inner_widths", [24, "24"], r"inner_widths is \[24, '24'\]; expected a list of int"),
        ("ternary", [1, 0], r"ternary is \[1, 0\]; expected a list of bool"),
        ("conv", "both", "conv is 'both'; supported: 'shared', 'separate'"),
        ("blocks", 500, "config.json says 502 blocks, but .* holds 56 tensors in all"),
        ("width", 0, "width"),
        ("window", -1, "window is -1; expected at least 0"),
        ("expand_ratio", 3, "has shape"),
        ("packed", True, "lacks .*weight_sum"),
        ("packed", 1, "packed is 1; expected a value of type bool"),
    ],
)
def test_settings_that_cannot_be(key: str, value: Any, said: str, folder: Path) -> None:
    (folder / "export.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=said):
        read_export(folder)
