"""Packed ternary kernels: the same signs and scale to the last bit, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import HnetConfig
from smallcoder_jax.huggingface import packed, record, reference, write
from smallcoder_jax.huggingface.read import read_export
from smallcoder_jax.models import build
from smallcoder_jax.models.families import published
from smallcoder_jax.ops.ternary import quantized_kernel
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.helpers import FLOAT32
from tests.huggingface.conftest import llama, random_params
from tests.huggingface.hnet_models import FLAT, MIXED, made


def kernel(inputs: int, outputs: int, scale: float = 0.1, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(inputs, outputs))).astype(np.float32)


def unpacked(tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    return packed.unpack("x", tensors["x"], float(tensors["x_sum"]), shape)


@pytest.mark.parametrize(
    ("inputs", "outputs", "scale"), [(16, 24, 0.1), (7, 5, 3.0), (1, 1, 0.02), (130, 333, 1e-4), (512, 1024, 0.04)]
)
def test_signs_and_scale_are_kept_to_the_last_bit(inputs: int, outputs: int, scale: float) -> None:
    given = kernel(inputs, outputs, scale)
    tensors = packed.pack("x", given)
    assert tensors["x"].shape == packed.packed_shape(given.shape) == (outputs, -(-inputs // 4))
    assert tensors["x"].dtype == np.uint8
    again = unpacked(tensors, given.shape)
    for one, two in zip(quantized_kernel(jnp.asarray(given)), quantized_kernel(jnp.asarray(again)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    repeated = packed.pack("x", again)
    assert {name: value.tobytes() for name, value in repeated.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }


def test_the_sum_is_exact_in_whatever_order() -> None:
    """So that a mean on another device, which adds in another order, is the same."""
    given = kernel(130, 333, seed=1)
    tensors = packed.pack("x", given)
    values = np.abs(unpacked(tensors, given.shape)).reshape(-1)
    total = np.float32(tensors["x_sum"])
    rng = np.random.default_rng(0)
    for order in (values, values[::-1], np.sort(values), rng.permutation(values)):
        assert np.cumsum(order, dtype=np.float32)[-1] == total
    assert np.float64(total) == np.sum(values, dtype=np.float64)


def test_the_layout_of_the_bytes() -> None:
    tensors = packed.pack("x", np.array([[1.0, -1.0], [0.0, 1.0], [-1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], np.float32))
    # 2 bits each, the first input lowest: sign + 1; what is left of a byte holds the code of 0.
    assert tensors["x"].tolist() == [[0b10_00_01_10, 0b01_01_01_10], [0b01_10_10_00, 0b01_01_01_10]]
    assert float(tensors["x_sum"]) == 8.0


def test_kernels_of_zeros_and_of_next_to_nothing() -> None:
    """The second one's mean is below the smallest number that is scaled up."""
    zeros, small = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    small[0, 0] = 6e-6
    np.testing.assert_array_equal(unpacked(packed.pack("x", zeros), (4, 4)), zeros)
    again = unpacked(packed.pack("x", small), (4, 4))
    for one, two in zip(quantized_kernel(jnp.asarray(small)), quantized_kernel(jnp.asarray(again)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.slow
def test_a_kernel_with_too_many_weights_is_refused() -> None:
    """More weights that are not 0 than float32 can count."""
    with pytest.raises(
        UserError, match=r"x cannot be packed without a change: 16,777,220 weights, of which 16,777,220"
    ):
        packed.pack("x", np.ones((4, 2**22 + 1), np.float32))


def export(folder: Path, model: HnetConfig, packing: Any = "packed", dtype: Any = "float32") -> build.Params:
    params = made(model)
    options: dict[str, Any] = {"card": {"name": "x"}, "packing": packing, "dtype": dtype}
    write.write_export(folder, model=model, params=params, tokenizer=ByteTokenizer(), **options)
    return params


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat") / "out"
    export(folder, FLAT)
    return folder


@pytest.fixture
def folder(flat: Path, tmp_path: Path) -> Path:
    return shutil.copytree(flat, tmp_path / "out")


def test_the_forward_pass_is_that_of_the_float_export_to_the_last_bit(flat: Path, tmp_path: Path) -> None:
    export(tmp_path / "float", FLAT, packing="float")
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))

    @jax.jit
    def forward(params: Any) -> Any:
        module = build.bind(build.abstract_model(FLAT, FLOAT32)[0], params)
        return build.logits(module, module(ids, positions, jnp.ones_like(ids)).states_BTD)

    results = [np.asarray(forward(read_export(each).params)) for each in (flat, tmp_path / "float")]
    np.testing.assert_array_equal(*results)


def test_written_again_it_is_the_same(flat: Path, tmp_path: Path) -> None:
    export, said = read_export(flat), record.read(flat)
    assert said.weights == "packed"
    options: dict[str, Any] = {"card": said.card, "packing": said.weights, "dtype": said.dtype}
    write.write_export(tmp_path / "two", model=export.model, params=export.params, tokenizer=ByteTokenizer(), **options)
    for path in flat.iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_pytorch_has_the_same_signs_and_scale(flat: Path) -> None:
    theirs = reference.load(flat, FLAT, transformers, torch)[0].float()
    params, modules = read_export(flat).params, dict(theirs.named_modules())
    ternary = [tensor for tensor in published(FLAT).tensors(FLAT) if tensor.ternary]
    assert len(ternary) == 2 * 6 + 1
    for tensor in ternary:
        ours = params
        for key in tensor.ours[0]:
            ours = ours[key]
        signs, unit = quantized_kernel(jnp.asarray(ours))
        their_signs, their_unit = modules[tensor.name.removesuffix(".weight")].quantized(torch.float32)
        np.testing.assert_array_equal(their_signs.numpy().T, np.asarray(signs))
        # A quotient here, a product with 1 / N there.
        assert float(their_unit) == pytest.approx(float(unit), rel=1e-6)


def test_it_is_a_tenth_of_the_float_file() -> None:
    """By arithmetic, of the published flat shape; its 83.0 MB became 5.8 MB."""
    model = HnetConfig(width=512, blocks=6)
    shapes = published(model).shapes(model)
    sizes = {True: 0, False: 0}
    for tensor in published(model).tensors(model):
        sizes[tensor.ternary] += int(np.prod(shapes[tensor.ours[0]]))
    whole = 4 * (sizes[True] + sizes[False])
    assert whole == 4 * model.parameter_count()
    assert sizes[True] / 4 + 4 * sizes[False] < whole / 10


def test_the_rest_is_stored_in_the_dtype(tmp_path: Path) -> None:
    export(tmp_path / "out", MIXED, dtype="bfloat16")
    params = write.stored_params(MIXED, made(MIXED), "bfloat16", "packed")
    for mine, stored in zip(
        jax.tree.leaves(params), jax.tree.leaves(read_export(tmp_path / "out").params), strict=True
    ):
        np.testing.assert_array_equal(stored, mine)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    up = "stage.inner.stack.blocks.0.mlp.up"
    assert (kinds[f"{up}.weight"], kinds[f"{up}.weight_sum"], kinds[f"{up}.gain"]) == ("U8", "F32", "BF16")
    assert kinds["stage.encoder.blocks.0.mlp.up.weight"] == "BF16"  # of a stage in full precision
    assert "take two bits each" in (tmp_path / "out" / "README.md").read_text()


def test_models_without_ternary_weights_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": ByteTokenizer(), "card": {"name": "x"}, "packing": "packed"}
    bare = dataclasses.replace(FLAT, ternary=(False,))
    with pytest.raises(UserError, match="only ternary weights can be packed, and this model has none"):
        write.write_export(tmp_path / "out", model=bare, params=made(bare), **options)
    other = llama(vocab_size=256)
    with pytest.raises(UserError, match="export it with --weights=float"):
        write.write_export(tmp_path / "out", model=other, params=random_params(other), **options)
    assert not list(tmp_path.iterdir())


def change(folder: Path, edit: Any) -> None:
    """Changes tensors of a folder that has no record, as of somebody else."""
    (folder / record.RECORD).unlink(missing_ok=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_flipped_bit_is_seen(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or was changed since the export"):
        read_export(folder)


UP = "stage.stack.blocks.1.mlp.up.weight"


def test_a_code_of_no_sign_is_refused_by_name_here_and_in_pytorch(folder: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[UP][0, 0] |= 3

    change(folder, edit)
    with pytest.raises(UserError, match=rf"tensor {UP} holds a code that stands for none of -1, 0 and 1"):
        read_export(folder)
    theirs = reference.load(folder, FLAT, transformers, torch)[0]
    with pytest.raises(ValueError, match=rf"{UP} holds a code other than those"):
        theirs(input_ids=torch.tensor([[1]]))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors.update({UP: tensors[UP].astype(np.float32)}), f"tensor {UP} is F32; supported: U8"),
        (lambda tensors: tensors.update({UP: tensors[UP][:, :-1].copy()}), f"tensor {UP} has shape"),
        (lambda tensors: tensors.pop(f"{UP}_sum"), f"lacks {UP}_sum"),
        (lambda tensors: tensors.update({f"{UP}_sum": np.array(-1.0, np.float32)}), f"tensor {UP}_sum is -1.0"),
        (lambda tensors: tensors.update({f"{UP}_sum": np.array(0.0, np.float32)}), f"{UP}_sum is 0.0, too little for"),
        (lambda tensors: tensors.update({f"{UP}_sum": np.array(np.nan, np.float32)}), f"tensor {UP}_sum is nan"),
        (lambda tensors: tensors.update({f"{UP}_sum": np.array([1, 0], np.uint8)}), f"tensor {UP}_sum has shape"),
        (lambda tensors: tensors.update({"embed.weight": np.zeros((256, 16), np.uint8)}), "embed.weight is U8"),
    ],
)
def test_tensors_that_are_not_what_they_should_be(edit: Any, said: str, folder: Path) -> None:
    change(folder, edit)
    with pytest.raises(UserError, match=said):
        read_export(folder)


def test_a_record_of_unknown_weights(folder: Path) -> None:
    path = folder / record.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "zip"}))
    with pytest.raises(UserError, match="has weights 'zip'; expected one of float, packed"):
        record.read(folder)
