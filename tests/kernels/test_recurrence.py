"""The kernels of the recurrence, interpreted, against a loop in float64; how many bytes they copy; and their door."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, HnetConfig, MeshConfig, ModelConfig
from smallcoder_jax.kernels import recurrence_hopper, recurrence_tpu
from smallcoder_jax.mesh import CHANNELS, ROWS, make_mesh, on_mesh
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.ops import recurrence as door
from smallcoder_jax.ops.recurrence import choose, recurrence
from smallcoder_jax.stages.shared.next_token import make_loss
from smallcoder_jax.train.program import make_program
from smallcoder_jax.train.start_table import start_sections
from tests.helpers import CAPTURES, max_difference, packed_batch, tiny_config, tiny_model
from tests.kernels.cases import relative_error
from tests.kernels.interpreter import INTERPRET

pytestmark = CAPTURES

KERNELS: dict[str, Callable[..., Array]] = {
    "pallas_tpu": functools.partial(recurrence_tpu.recurrence, interpret=True),
    "pallas_gpu": functools.partial(recurrence_hopper.recurrence, interpret=INTERPRET),
}
# Rounding of the inputs' type, which is also that of their gradients.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8}


class Case(NamedTuple):
    keep: Array
    new: Array
    start: Array
    dh: Array


def draw(length: int, width: int, dtype: DTypeLike, rows: int = 2, seed: int = 0) -> Case:
    """Rows with a long memory, documents that begin within them, and padding, which follows a document that must not be
    forgotten."""
    generator = np.random.default_rng(seed)
    keep = generator.uniform(0.0, 1.0, (rows, length, width)) ** 0.1
    new = generator.normal(size=keep.shape)
    keep[0, [length // 3, length // 3 + 1]] = 0.0
    keep[-1, length // 2], new[-1, -length // 4 :], keep[-1, -length // 4 :] = 0.0, 0.0, 1.0
    start, dh = generator.normal(size=(rows, width)), generator.normal(size=keep.shape)
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    return Case(jnp.asarray(keep, dtype), jnp.asarray(new, dtype), as_float(start), as_float(dh))


def truth(case: Case) -> tuple[np.ndarray, ...]:
    """h and the gradients of keep, new and start, position by position."""
    keep, new, state, dh = (np.asarray(x, np.float64) for x in case)
    h, before, d_keep, d_new = (np.zeros_like(new) for _ in range(4))
    for t in range(keep.shape[1]):
        before[:, t], state = state, keep[:, t] * state + new[:, t]
        h[:, t] = state
    d_state = np.zeros_like(state)
    for t in reversed(range(keep.shape[1])):
        d_new[:, t] = dh[:, t] + d_state
        d_keep[:, t] = d_new[:, t] * before[:, t]
        d_state = keep[:, t] * d_new[:, t]
    return h, d_keep, d_new, d_state


@functools.partial(jax.jit, static_argnums=0)
def everything(function: Callable[..., Array], case: Case) -> tuple[Array, ...]:
    h, pull = jax.vjp(function, *case[:3])
    return h, *pull(case.dh)


def check(name: str, case: Case) -> None:
    found = everything(KERNELS[name], case)
    dtypes = [jnp.float32, case.keep.dtype, case.new.dtype, jnp.float32]
    assert [each.dtype for each in found] == dtypes
    for what, got, want, dtype in zip(("h", "dkeep", "dnew", "dstart"), found, truth(case), dtypes, strict=True):
        assert relative_error(got, want) <= TOLERANCE[jnp.dtype(dtype).name], what


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("length", "width"),
    [
        (1100, 640),  # blocks that reach beyond the row, several blocks of channels
        (1024, 96),  # whole blocks, less than one register of channels
        (5, 600),  # less than one block, and channels that blocks reach beyond
    ],
)
def test_on_tpus_equals_a_loop(length: int, width: int, dtype: str) -> None:
    check("pallas_tpu", draw(length, width, dtype))


@pytest.mark.parametrize(
    ("rows", "length", "width", "dtype"),
    [
        (1, 200, 128, "float32"),  # more blocks than the ring has, padded to whole ones
        (2, 40, 256, "bfloat16"),  # several rows and blocks of channels
        pytest.param(2, 400, 256, "float32", marks=pytest.mark.slow),
        pytest.param(2, 400, 256, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_on_hopper_equals_a_loop(rows: int, length: int, width: int, dtype: str) -> None:
    check("pallas_gpu", draw(length, width, dtype, rows))


@pytest.mark.parametrize("name", KERNELS)
def test_each_input_has_its_own_type(name: str) -> None:
    case = draw(40, 128, "float32")
    check(name, case._replace(new=case.new.astype(jnp.bfloat16)))


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_crosses_the_beginning_of_a_document_and_padding_keeps_the_state(name: str) -> None:
    case = draw(40, 128, "float32")
    keep, new = case.keep.at[:, 20].set(0.0), case.new.at[:, 30:].set(0.0)
    case = case._replace(keep=keep.at[:, 30:].set(1.0), new=new, dh=case.dh.at[:, :20].set(0.0))
    h, d_keep, d_new, d_start = everything(KERNELS[name], case)
    np.testing.assert_allclose(h[:, 30:], jnp.broadcast_to(h[:, 29:30], h[:, 30:].shape), rtol=1e-4, atol=1e-6)
    assert not d_new[:, :20].any()
    assert not d_keep[:, :20].any()
    assert not d_start.any()
    assert d_keep[:, 20].all()  # what would be there if the document had not begun


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_reference_takes_the_types_that_the_kernels_take(dtype: str) -> None:
    case = draw(40, 128, dtype)
    found = everything(functools.partial(recurrence, implementation="xla"), case)
    assert [each.dtype for each in found] == ["float32", dtype, dtype, "float32"]
    for got, want in zip(found, truth(case), strict=True):
        assert relative_error(got, want) <= TOLERANCE[dtype]


def copied(case: Case) -> dict[str, int]:
    """Bytes that the TPU kernels copy between HBM and VMEM: a block whenever the next step of the grid needs another
    one. By the kernel's name, from the blocks and the grid that Pallas is given.
    """
    jaxpr = jax.make_jaxpr(lambda *x: everything(recurrence_tpu.recurrence, Case(*x)))(*case)
    found = {}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                mapping = equation.params["grid_mapping"]
                steps = list(np.ndindex(*mapping.grid))
                total = 0
                for block in mapping.block_mappings:
                    index = jax.jit(jax.vmap(jax.extend.core.jaxpr_as_fun(block.index_map_jaxpr)))
                    at = np.stack(index(*np.asarray(steps, np.int32).T))
                    changes = 1 + int((at[:, 1:] != at[:, :-1]).any(0).sum())
                    shape = [getattr(each, "block_size", each) for each in block.block_shape]
                    total += changes * int(np.prod(shape)) * block.array_aval.dtype.itemsize
                found[equation.params["name"] or str(equation.params["name_and_src_info"])] = total
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jaxpr.jaxpr)
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tpu_kernels_copy_little_more_than_they_must(dtype: str) -> None:
    case = Case(*(jnp.zeros(x.shape, x.dtype) for x in draw(2048, 1024, dtype)))
    forward, backward = copied(case).values()
    own, float32 = case.keep.nbytes, case.dh.nbytes
    assert 2 * own + float32 <= forward <= 1.02 * (2 * own + float32)
    assert 3 * own + 2 * float32 <= backward <= 1.02 * (3 * own + 2 * float32)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Returns the shapes that the kernels will be called with, a list that grows."""
    shapes = []

    def record(name: str, *inputs: Array) -> Array:
        shapes.append(inputs[0].shape)
        return KERNELS[name](*inputs)

    monkeypatch.setattr(door.recurrence_tpu, "recurrence", functools.partial(record, "pallas_tpu"))
    monkeypatch.setattr(door.recurrence_hopper, "recurrence", functools.partial(record, "pallas_gpu"))
    return shapes


def test_on_a_mesh_each_device_works_on_its_rows_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = interpreted(monkeypatch)
    case = draw(40, 256, "float32", rows=8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), tiny_model(vocab_size=96), 8, jax.devices()[:8])
    specs = Case(CHANNELS, CHANNELS, P(ROWS[0], "tensor"), CHANNELS)
    placed = Case(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(case, specs, strict=True)))
    asked = functools.partial(recurrence, implementation="pallas_tpu")
    found = jax.jit(on_mesh(mesh, functools.partial(everything, asked)))(placed)
    assert set(shapes) == {(2, 40, 128)}
    for got, want, spec in zip(found, truth(case), (CHANNELS, CHANNELS, CHANNELS, specs.start), strict=True):
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), got.ndim)  # nothing was gathered
        assert relative_error(got, want) <= TOLERANCE["float32"]


FLAT = HnetConfig(width=128, blocks=1, context=64)
STAGED = HnetConfig(width=64, inner_widths=(128,), encoder_blocks=(1,), decoder_blocks=(1,), blocks=1, context=64)


def model_gradients(model: HnetConfig, compute: ComputeConfig) -> object:
    batch = {name: jnp.asarray(value) for name, value in packed_batch(tiny_model(), 2, 64, seed=2).items()}
    graph, _ = build.abstract_model(model, compute)
    params = build.init_params(model, compute, jax.random.key(0))

    def total(params: Any) -> Array:
        hidden = build.bind(graph, params)(batch["tokens"], batch["positions"], batch["segment_ids"]).states_BTD
        return jnp.sum(jnp.sin(hidden) * batch["loss_weights"][:, :, None])

    return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize("model", [FLAT, pytest.param(STAGED, marks=pytest.mark.slow)], ids=["flat", "staged"])
def test_gradients_of_a_whole_model_equal_the_reference(model: HnetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = interpreted(monkeypatch)
    computes = [ComputeConfig(dtype="float32", recurrence=name) for name in ("xla", "pallas_tpu")]
    want, got = (model_gradients(model, compute) for compute in computes)
    # Those of the blocks, of the smoothed outputs of a stage within, and of the gradients of its chunks.
    assert set(shapes) == {(2, *shape) for shape in family_of(model).recurrence_shapes(model, 64)}
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    assert largest > 1.0
    assert max_difference(want, got) <= 1e-4 * largest


SHAPE: dict[str, Any] = {"length": 8192, "width": 1024, "dtypes": ("float32", "bfloat16")}
H200 = {"platform": "gpu", "device": "NVIDIA H200"}


@pytest.mark.parametrize(
    ("changes", "implementation", "reason"),
    [
        ({"platform": "tpu", "device": "TPU v5 lite"}, "pallas_tpu", "platform 'tpu'"),
        (H200, "pallas_gpu", "platform 'gpu'"),
        ({"platform": "cpu"}, "xla", "the only one for platform 'cpu'"),
        ({}, "xla", "the only one for platform 'cpu'"),  # these tests' devices
        ({**H200, "length": 1}, "xla", "rows of 1 positions, fewer than 16"),
        ({"platform": "gpu", "device": "NVIDIA A100-SXM4-80GB"}, "xla", "made for NVIDIA Hopper"),
        ({"platform": "tpu", "device": "TPU v2"}, "xla", "not for TPU v2"),
        ({**H200, "width": 192}, "xla", "multiples of 128 channels on each device, not 192"),
        ({**H200, "tensor": 16}, "xla", "multiples of 128 channels on each device, not 64"),
        ({**H200, "tensor": 8}, "pallas_gpu", "platform 'gpu'"),
        ({"platform": "tpu", "width": 96}, "pallas_tpu", "platform 'tpu'"),
        ({"platform": "tpu", "tensor": 3}, "xla", r"mesh\.tensor=3 does not divide the 1024 channels"),
        ({"platform": "tpu", "context": 2}, "xla", r"whole rows, which mesh\.context=2 splits"),
    ],
)
def test_auto_chooses_by_platform_and_shape(changes: dict, implementation: str, reason: str) -> None:
    chosen = choose("auto", **{**SHAPE, **changes})
    assert chosen.implementation == implementation
    assert re.search(reason, chosen.reason)


@pytest.mark.parametrize(
    ("implementation", "changes", "words"),
    [
        ("triton", {}, "known: auto, xla, pallas_tpu, pallas_gpu"),
        ("pallas_tpu", {"platform": "cpu"}, "runs on TPUs; the platform is 'cpu'"),
        ("pallas_gpu", {"platform": "tpu"}, "runs on GPUs; the platform is 'tpu'"),
        ("pallas_gpu", {"width": 100}, "multiples of 128 channels on each device, not 100; use auto or xla"),
        ("pallas_gpu", {"dtypes": ("float16", "float32")}, "float32 and bfloat16, not float16"),
        ("pallas_tpu", {"dtypes": ("float32", "int32")}, "float32 and bfloat16, not int32"),
        ("pallas_gpu", {"device": "NVIDIA GeForce RTX 4090"}, "not for NVIDIA GeForce RTX 4090"),
        ("pallas_tpu", {"device": "TPU v2"}, "not for TPU v2"),
        ("pallas_tpu", {"context": 4}, r"whole rows, which mesh\.context=4 splits"),
        ("pallas_gpu", {"tensor": 3}, r"mesh\.tensor=3 does not divide the 1024 channels"),
    ],
)
def test_what_cannot_be_served_is_an_error_that_says_why(implementation: str, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose(implementation, **{**SHAPE, **changes})


def test_the_door_holds_the_shape_against_what_was_asked_for() -> None:
    case = draw(40, 96, "float32")
    with pytest.raises(UserError, match="multiples of 128 channels on each device, not 96"):
        recurrence(*case[:3], implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 4, "tensor": 2}, "multiples of 128 channels on each device, not 64"),
        ({"data": 4, "context": 2}, r"whole rows, which mesh\.context=2 splits"),
    ],
)
def test_the_door_knows_what_a_device_of_the_mesh_holds(sizes: dict[str, int], words: str) -> None:
    case = draw(40, 128, "float32", rows=8)
    mesh = make_mesh(MeshConfig(**sizes), tiny_model(vocab_size=96), 8, jax.devices()[:8])
    function = on_mesh(mesh, functools.partial(recurrence, implementation="pallas_gpu"))
    with pytest.raises(UserError, match=words):
        jax.eval_shape(function, *case[:3])


def test_a_family_says_which_recurrences_it_has() -> None:
    shapes = family_of(STAGED).recurrence_shapes(STAGED, 1024)
    assert set(shapes) == {(1024, 64), (STAGED.room(1024), 64), (STAGED.room(1024), 128)}
    assert not family_of(tiny_model()).recurrence_shapes(tiny_model(), 1024)


@pytest.mark.parametrize("model", [STAGED, tiny_model()], ids=["hnet", "decoder"])
def test_a_run_shows_what_was_chosen(model: ModelConfig) -> None:
    config = tiny_config(model=model)
    program = make_program(config, make_loss(config), jax.devices()[:1])
    shown = start_sections(config, program, program.state, {}, None)["model"]
    assert shown.get("recurrence") == ("xla (the only one for platform 'cpu')" if model is STAGED else None)
    wrong = dataclasses.replace(config, compute=dataclasses.replace(config.compute, recurrence="pallas_tpu"))
    if model is STAGED:
        with pytest.raises(UserError, match="runs on TPUs; the platform is 'cpu'"):
            make_program(wrong, make_loss(wrong), jax.devices()[:1])
    else:
        make_program(wrong, make_loss(wrong), jax.devices()[:1])  # there is nothing to choose
