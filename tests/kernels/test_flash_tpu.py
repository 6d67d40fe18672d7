"""The TPU kernel, interpreted: values and gradients against all scores at once, and that blocks are really skipped."""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from smallcoder_jax.config import ComputeConfig, MeshConfig
from smallcoder_jax.kernels import flash_tpu
from smallcoder_jax.kernels.tile_table import Tiles
from smallcoder_jax.kernels.tiles import TpuTiles
from smallcoder_jax.mesh import HEADS, make_mesh, on_mesh
from smallcoder_jax.models import build
from smallcoder_jax.ops import attention as attention_door
from tests.helpers import CAPTURES, max_difference, packed_batch, tiny_model
from tests.kernels.cases import KINDS, Case, draw, relative_error, rotation, truth

pytestmark = CAPTURES

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
GROUPS, SIZES = (1, 3, 4, 8), (64, 80, 128)
REST = list(itertools.product((256, 300), (None, 90)))  # lengths that do and do not divide the tiles; windows
# Every pair of a group or a head size with a length and a window occurs; the whole product is in the slow test.
SOME = [(group, size, *REST[(g + s) % 4]) for g, group in enumerate(GROUPS) for s, size in enumerate(SIZES)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def kernel(case: Case, window: int | None, tiles: TpuTiles) -> tuple[jax.Array, ...]:
    """Output and the gradients of q, k and v."""
    attend = functools.partial(
        flash_tpu.flash_attention, segment_ids_BT=case.segments, rotation=rotation(case), window=window, tiles=tiles,
        interpret=True,
    )  # fmt: skip
    o, pull = jax.vjp(attend, case.q, case.k, case.v)
    return o, *pull(case.do)


def check(group: int, size: int, length: int, window: int | None, dtype: str, tiles: TpuTiles) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    case = draw(length, 2 * group, 2, size, jnp.dtype(dtype), seed)
    errors = [relative_error(*pair) for pair in zip(kernel(case, window, tiles), truth(case, window), strict=True)]
    assert max(errors) <= TOLERANCE[dtype], f"{seed=}: output, dq, dk, dv differ by {errors}"


@pytest.mark.parametrize(("group", "size", "length", "window"), SOME)
def test_float32_equals_the_truth(group: int, size: int, length: int, window: int | None) -> None:
    check(group, size, length, window, "float32", TpuTiles(128, 128))


@pytest.mark.parametrize(("group", "size", "length", "window"), SOME[::3])
@pytest.mark.parametrize("tiles", [TpuTiles(128, 256), TpuTiles(256, 128)])
def test_bfloat16_equals_the_truth(group: int, size: int, length: int, window: int | None, tiles: TpuTiles) -> None:
    check(group, size, length, window, "bfloat16", tiles)


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("length", "window"), REST)
def test_the_whole_product_equals_the_truth(group: int, size: int, length: int, window: int | None, dtype: str) -> None:
    check(group, size, length, window, dtype, TpuTiles(128, 128))


def test_without_rotation() -> None:
    case = draw(256, 4, 2, 64, jnp.dtype("float32"), 1)
    still = case._replace(positions=jnp.zeros_like(case.positions))  # angle 0
    attend = functools.partial(flash_tpu.flash_attention, window=None, tiles=TpuTiles(128, 128), interpret=True)
    with_tables = attend(*case[:3], case.segments, rotation(still))
    np.testing.assert_allclose(attend(*case[:3], case.segments, None), with_tables, atol=1e-6)


@pytest.mark.parametrize("window", [None, 200])
def test_a_block_is_visited_if_and_only_if_a_query_sees_it(window: int | None) -> None:
    """A NaN in the values of one key block reaches the outputs of just those blocks of queries that visit it, masked or
    not; a NaN in the gradient of one block of queries, the gradients of just those keys.
    """
    length, block = 768, 128
    case = draw(length, 2, 1, 64, jnp.dtype("float32"), 5)
    distance = case.positions[:, :, None] - case.positions[:, None, :]
    same = (case.segments[:, :, None] == case.segments[:, None, :]) & (case.segments[:, :, None] > 0)
    seen = np.asarray(same & (distance >= 0) & (distance < (window or length)))
    by_hand = seen.reshape(len(KINDS), 6, block, 6, block).any((2, 4))
    visited_forward, visited_backward = np.zeros_like(by_hand), np.zeros_like(by_hand)
    for n in range(6):
        at = slice(n * block, (n + 1) * block)
        poisoned = case._replace(v=case.v.at[:, at].set(jnp.nan), do=case.do.at[:, at].set(jnp.nan))
        o = kernel(poisoned._replace(do=case.do), window, TpuTiles(block, block))[0]
        dv = kernel(poisoned._replace(v=case.v), window, TpuTiles(block, block))[3]
        visited_forward[:, :, n] = np.isnan(o).reshape(len(KINDS), 6, -1).any(-1)
        visited_backward[:, n, :] = np.isnan(dv).reshape(len(KINDS), 6, -1).any(-1)
    np.testing.assert_array_equal(visited_forward, by_hand)
    np.testing.assert_array_equal(visited_backward, by_hand)
    assert by_hand.sum() < len(KINDS) * 21  # fewer than causality alone would leave


def test_rows_that_do_not_fit_into_a_chip_are_refused_with_the_reason() -> None:
    def reason(length: int, device: str | None, *, dtype: str = "bfloat16", block_q: int = 512) -> str | None:
        return flash_tpu.obstacle(length, 4, 128, dtype, TpuTiles(block_q, 512), device)

    for device in ("TPU v5 lite", "TPU v5", "TPU v6 lite", None, "cpu"):
        assert reason(16384, device) is None
    for device in ("TPU v5", None, "cpu"):  # 64 MiB, and what is not known counts as that
        assert "rows of 32768 tokens need about 67 MiB of VMEM" in str(reason(32768, device))
        assert reason(32768, device, block_q=256) is None
    for device in ("TPU v5 lite", "TPU v6 lite"):
        assert reason(32768, device) is None
        assert "more than 120" in str(reason(131072, device))
    assert reason(16384, "TPU v5", dtype="float32")  # twice the keys
    assert "not for TPU v4" in str(reason(1024, "TPU v4"))


def test_tiles_are_checked() -> None:
    for sizes in ((100, 128), (0, 128), (384, 256)):
        with pytest.raises(ValueError, match=r"block_q="):
            TpuTiles(*sizes)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_door.flash_tpu, "flash_attention", functools.partial(flash_tpu.flash_attention, interpret=True)
    )
    small = Tiles(TpuTiles(128, 128), False, "the smallest")
    monkeypatch.setattr(attention_door, "lookup", lambda *shape: small)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_gradients_of_a_whole_model_equal_the_reference(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch)
    found = {name: model_gradients(ComputeConfig(dtype="float32", attention=name, layers=layers)) for name in NAMES}
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found["xla"]))
    assert largest > 1.0
    assert max_difference(*found.values()) <= 2e-5 * largest


NAMES = ("xla", "pallas_tpu")


def model_gradients(compute: ComputeConfig) -> object:
    model = tiny_model(context=200)
    batch = {name: jnp.asarray(value) for name, value in packed_batch(model, 2, 200, seed=2).items()}
    graph, _ = build.abstract_model(model, compute)
    params = build.init_params(model, compute, jax.random.key(0))

    def total(params):
        hidden = build.bind(graph, params)(batch["tokens"], batch["positions"], batch["segment_ids"]).states_BTD
        return jnp.sum(jnp.sin(hidden) * batch["loss_weights"][:, :, None])

    return jax.jit(jax.grad(total))(params)


def test_on_a_mesh_each_device_works_on_its_rows_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch)
    case = draw(256, 4, 2, 64, jnp.dtype("float32"), 7)
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x[:3]]), case)  # 8 rows
    model = tiny_model(vocab_size=96, heads=4, kv_heads=2, head_size=64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), model, 8, jax.devices()[:8])
    asked = {
        "q_positions_BT": rows.positions, "kv_positions_BS": rows.positions, "q_segment_ids_BT": rows.segments,
        "kv_segment_ids_BS": rows.segments, "rope_theta": 1e4,
    }  # fmt: skip
    attend = functools.partial(attention_door.attention, **asked)
    want = attend(*rows[:3], implementation="xla")
    sharded = jax.jit(on_mesh(mesh, functools.partial(attend, implementation="pallas_tpu")))
    o = sharded(*(jax.device_put(x, NamedSharding(mesh, HEADS)) for x in rows[:3]))
    assert o.sharding.spec == HEADS  # nothing was gathered
    np.testing.assert_allclose(o, want, atol=2e-5)


@pytest.mark.slow
def test_where_rows_are_split_each_device_has_its_queries_see_the_keys_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch)
    case = draw(512, 4, 2, 64, jnp.dtype("float32"), 7)
    rows = jax.tree.map(lambda x: x[:2], case)
    model = tiny_model(vocab_size=96, heads=4, kv_heads=2, head_size=64)
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=2), model, 2, jax.devices()[:8])
    assert (rows.segments[:, 127:-1:128] == rows.segments[:, 128::128]).any()  # a document crosses a border

    def total(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        o = attention_door.attention(
            q, k, v, q_positions_BT=rows.positions, kv_positions_BS=rows.positions, q_segment_ids_BT=rows.segments,
            kv_segment_ids_BS=rows.segments, rope_theta=1e4, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(3.0 * o)), o

    (_, want), d_want = jax.value_and_grad(functools.partial(total, "xla"), (0, 1, 2), has_aux=True)(*rows[:3])
    gradient = jax.value_and_grad(functools.partial(total, "pallas_tpu"), (0, 1, 2), has_aux=True)
    placed = [jax.device_put(x, NamedSharding(mesh, HEADS)) for x in rows[:3]]
    (_, o), d = jax.jit(on_mesh(mesh, gradient))(*placed)
    assert o.sharding.is_equivalent_to(NamedSharding(mesh, HEADS), o.ndim)
    np.testing.assert_allclose(o, want, atol=2e-5)
    for found, expected in zip(d, d_want, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_queries_that_are_elsewhere_visit_no_keys() -> None:
    """NaN in the keys of another document's blocks, and of blocks that come later, would spread to what visits them."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 512, heads, 64)) for i, heads in enumerate((4, 2, 2)))
    segments = jnp.repeat(jnp.array([[1, 2, 2, 3]], jnp.int32), 128, axis=1)
    poisoned = jnp.where(jnp.isin(segments, jnp.array([1, 3]))[:, :, None, None], jnp.nan, k)
    attend = functools.partial(flash_tpu.flash_attention, window=None, tiles=TpuTiles(128, 128), interpret=True)
    want = attend(q, k, v, segments, None)[:, 256:384]

    def own(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q[:, 256:384], k, v, segments, None, first_query=jnp.int32(256))

    np.testing.assert_array_equal(own(q, poisoned, v), want)
    dq, dk, dv = jax.grad(lambda *x: jnp.sum(own(*x)), (0, 1, 2))(q, poisoned, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (dq, dk, dv))
    assert not dk[:, :128].any()
    assert dk[:, 128:384].any()
