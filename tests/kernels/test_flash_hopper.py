"""The Hopper kernels in Mosaic GPU's interpreter: values and gradients against all scores at once, and that blocks are
really skipped.

The interpreter runs the kernels as they stand, every warpgroup, copy and barrier, in threads. It does not know wgmma
with transposed tiles or operands in registers, so these products are XLA's there; what they are on a GPU, only a GPU
shows.
"""

import functools
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import ComputeConfig
from smallcoder_jax.kernels import flash_hopper
from smallcoder_jax.kernels.tiles import HopperTiles
from smallcoder_jax.models import build
from smallcoder_jax.ops import attention as attention_door
from tests.helpers import CAPTURES, packed_batch, tiny_model
from tests.kernels.cases import KINDS, Case, draw, relative_error, rotation, truth
from tests.kernels.interpreter import INTERPRET

pytestmark = CAPTURES

TOLERANCE = 2e-2
GROUPS, SIZES, REST = (1, 3, 4, 8), (64, 80, 128), list(itertools.product((256, 300), (None, 90)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def kernel(case: Case, window: int | None, tiles: HopperTiles) -> tuple[jax.Array, ...]:
    """Output and the gradients of q, k and v."""
    attend = functools.partial(
        flash_hopper.flash_attention, segment_ids_BT=case.segments, rotation=rotation(case), window=window, tiles=tiles,
        interpret=INTERPRET,
    )  # fmt: skip
    o, pull = jax.vjp(attend, case.q, case.k, case.v)
    return o, *pull(case.do)


def rows(length: int, group: int, size: int, kinds: tuple[str, ...] = KINDS, seed: int | None = None) -> Case:
    """One row of each kind, drawn anew in each run."""
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    print(f"{seed=}")
    return draw(length, group, 1, size, jnp.dtype("bfloat16"), seed, kinds)


def check(case: Case, window: int | None, tiles: HopperTiles) -> None:
    errors = [relative_error(*pair) for pair in zip(kernel(case, window, tiles), truth(case, window), strict=True)]
    assert max(errors) <= TOLERANCE, f"output, dq, dk, dv differ by {errors}"


@pytest.mark.parametrize(
    ("group", "size", "length", "window", "tiles"),
    [
        (2, 64, 256, None, HopperTiles()),  # both warpgroups at the same queries, of two heads
        # at two blocks of queries of one head
        pytest.param(3, 80, 200, 90, HopperTiles(block_kv=64, dq_block_kv=128), marks=pytest.mark.slow),
    ],
)
def test_equals_the_truth(group: int, size: int, length: int, window: int | None, tiles: HopperTiles) -> None:
    check(rows(length, group, size, ("many", "padding at the end")), window, tiles)


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("length", "window"), REST)
def test_the_whole_product_equals_the_truth(group: int, size: int, length: int, window: int | None) -> None:
    # One row with all of it: the interpreter takes seconds for each.
    check(rows(length, group, size, ("some of each",)), window, HopperTiles())


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize(
    "tiles", [HopperTiles(128, 3, 128, 2, 64, 3), HopperTiles(64, 2, 64, 2, 128, 2), HopperTiles(256, 2, 128, 2, 64, 4)]
)
def test_other_tiles_equal_the_truth(tiles: HopperTiles) -> None:
    check(rows(700, 4, 64), None, tiles)


def test_without_rotation() -> None:
    case = rows(128, 1, 64, ("many",), seed=1)
    still = case._replace(positions=jnp.zeros_like(case.positions))  # angle 0
    attend = functools.partial(
        flash_hopper.flash_attention, *case[:3], case.segments, window=None, tiles=HopperTiles(), interpret=INTERPRET
    )
    np.testing.assert_array_equal(attend(None), attend(rotation(still)))


def seen_blocks(case: Case, window: int | None, block_q: int, block_kv: int) -> np.ndarray:
    """Whether any query of a block sees any key of a block, counted from pairs of tokens: [I, J]."""
    positions, segments = (np.asarray(x[0]) for x in (case.positions, case.segments))
    distance = positions[:, None] - positions[None, :]
    seen = (segments[:, None] == segments[None, :]) & (segments[:, None] > 0) & (distance >= 0)
    seen &= distance < (window or len(positions))
    return seen.reshape(len(positions) // block_q, block_q, -1, block_kv).any((1, 3))


def poisoned(x_BTNH: jax.Array, block: int) -> jax.Array:
    """Copies of a row, in copy n a NaN in all of block n."""
    return jnp.stack([x_BTNH[0].at[at : at + block].set(jnp.nan) for at in range(0, x_BTNH.shape[1], block)])


def test_a_block_of_keys_is_visited_if_and_only_if_a_query_sees_it() -> None:
    case = rows(384, 2, 64, ("many",), seed=5)
    v_BTKH = poisoned(case.v, 128)
    copies = jax.tree.map(lambda x: jnp.repeat(x, len(v_BTKH), axis=0), case)
    o_BTNH = flash_hopper.flash_attention(
        copies.q, copies.k, v_BTKH, copies.segments, rotation(copies), window=None, tiles=HopperTiles(block_kv=128),
        interpret=INTERPRET,
    )  # fmt: skip
    visited = np.isnan(o_BTNH).reshape(3, 6, -1).any(-1).T
    by_hand = seen_blocks(case, None, 64, 128)
    np.testing.assert_array_equal(visited, by_hand)
    assert by_hand.sum() < 2 * (1 + 2 + 3)  # fewer than causality alone would leave


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
def test_a_block_of_queries_is_visited_if_and_only_if_it_sees_a_key(window: int | None) -> None:
    case = rows(384, 2, 64, ("many",), seed=5)
    do_BTNH = poisoned(case.do, 64)
    copies = jax.tree.map(lambda x: jnp.repeat(x, len(do_BTNH), axis=0), case)
    dv_BTKH = kernel(copies._replace(do=do_BTNH), window, HopperTiles())[3]
    visited = np.isnan(dv_BTKH).reshape(6, 3, -1).any(-1)
    np.testing.assert_array_equal(visited, seen_blocks(case, window, 64, 128))


def test_tiles_are_checked() -> None:
    for sizes in ({"block_kv": 96}, {"dkv_block_q": 0}, {"dq_stages": 1}):
        with pytest.raises(ValueError, match=r"block_kv="):
            HopperTiles(**sizes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"size": 80, "device": "NVIDIA H100 80GB HBM3"}, None),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "made for NVIDIA Hopper .* not for NVIDIA A100"),
        ({"dtype": "float32"}, "bfloat16, not float32"),
        ({"size": 256}, "head sizes up to 128, not 256"),
        ({"tiles": HopperTiles(block_kv=256)}, "KiB of shared memory, more than 227"),
    ],
)
def test_what_cannot_be_served_is_said(changes: dict, words: str | None) -> None:
    asked = {"length": 8192, "group": 4, "size": 128, "dtype": "bfloat16", "tiles": HopperTiles(), "device": None}
    found = flash_hopper.obstacle(**{**asked, **changes})
    assert found is None if words is None else re.search(words, found or "")


@pytest.mark.slow
def test_gradients_of_a_whole_model_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_door.flash_hopper,
        "flash_attention",
        functools.partial(flash_hopper.flash_attention, interpret=INTERPRET),
    )
    want, got = (model_gradients(ComputeConfig(attention=name)) for name in ("xla", "pallas_gpu"))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(a - b).max()) <= TOLERANCE * largest


def model_gradients(compute: ComputeConfig) -> object:
    model = tiny_model(context=200)
    batch = {name: jnp.asarray(value) for name, value in packed_batch(model, 2, 200, seed=2).items()}
    graph, _ = build.abstract_model(model, compute)
    params = build.init_params(model, compute, jax.random.key(0))

    def total(params):
        hidden = build.bind(graph, params)(batch["tokens"], batch["positions"], batch["segment_ids"]).states_BTD
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)) * batch["loss_weights"][:, :, None])

    return jax.jit(jax.grad(total))(params)
