"""The operations of byte-level models, against float64 references that are written out from the papers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.ops import chunking
from smallcoder_jax.ops.recurrence import recurrence
from smallcoder_jax.ops.ternary import quantized_activations, quantized_kernel, ternary_linear

pytestmark = pytest.mark.usefixtures("standard_promotion")

B, T, IN, OUT, D = 2, 24, 48, 40, 16
RNG = np.random.default_rng(0)
X_BTI = RNG.normal(size=(B, T, IN)).astype(np.float32)
KERNEL_IO = (RNG.normal(size=(IN, OUT)) * 0.1).astype(np.float32)
# Two documents in the first row, three and padding in the second.
SEGMENTS_BT = np.array([[1] * 10 + [2] * 14, [1] * 5 + [2] * 1 + [3] * 12 + [0] * 6], np.int32)
STARTS_BT = np.diff(SEGMENTS_BT, axis=1, prepend=0) > 0


def quantized(x: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    x_q = np.clip(np.round(scale * x), -128, 127) / scale
    unit = 1 / np.maximum(np.abs(kernel).mean(), 1e-5)
    return x_q, np.clip(np.round(unit * kernel), -1, 1) / unit


def test_a_ternary_product_and_its_straight_through_gradients() -> None:
    dy_BTO = RNG.normal(size=(B, T, OUT)).astype(np.float32)
    x_q, kernel_q = quantized(X_BTI.astype(np.float64), KERNEL_IO.astype(np.float64))
    y, back = jax.vjp(jax.jit(ternary_linear), jnp.asarray(X_BTI), jnp.asarray(KERNEL_IO))
    np.testing.assert_allclose(y, x_q @ kernel_q, rtol=1e-5, atol=1e-6)
    dx, d_kernel = back(jnp.asarray(dy_BTO))
    np.testing.assert_allclose(dx, dy_BTO @ kernel_q.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_kernel, np.einsum("bti,bto->io", x_q, dy_BTO), rtol=1e-4, atol=1e-4)


def test_a_ternary_product_is_that_of_integers_to_the_last_bit() -> None:
    whole, unit_of_token = quantized_activations(jnp.asarray(X_BTI))
    signs, unit = quantized_kernel(jnp.asarray(KERNEL_IO))
    assert whole.dtype == signs.dtype == jnp.int8
    assert set(np.unique(signs)) == {-1, 0, 1}
    assert np.abs(np.asarray(whole, np.int32)).max(axis=-1).min() == 127
    sums = np.asarray(whole, np.int32) @ np.asarray(signs, np.int32)
    scaled = np.asarray(jax.jit(ternary_linear)(jnp.asarray(X_BTI), jnp.asarray(KERNEL_IO)))
    found = scaled / np.asarray(unit_of_token * unit)
    np.testing.assert_array_equal(np.rint(found), sums)
    np.testing.assert_allclose(found, sums, rtol=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1e-9, -3.0])
def test_a_token_of_one_value_has_a_finite_product(fill: float) -> None:
    x, kernel = jnp.full((1, 1, IN), fill, jnp.float32), jnp.asarray(KERNEL_IO)
    x_q, kernel_q = quantized(np.full((1, 1, IN), fill), KERNEL_IO.astype(np.float64))
    np.testing.assert_allclose(ternary_linear(x, kernel), x_q @ kernel_q, rtol=1e-4, atol=1e-7)


def by_hand(keep: np.ndarray, new: np.ndarray, start: np.ndarray) -> np.ndarray:
    h, state = np.zeros_like(new), start
    for t in range(new.shape[1]):
        state = keep[:, t] * state + new[:, t]
        h[:, t] = state
    return h


def test_a_recurrence_and_its_gradients() -> None:
    keep, new = RNG.uniform(0, 1, size=(B, T, D)), RNG.normal(size=(B, T, D))
    keep[:, 7] = 0.0  # a document begins
    start, dh = RNG.normal(size=(B, D)), RNG.normal(size=(B, T, D))
    h, back = jax.vjp(jax.jit(recurrence), *(jnp.asarray(x, jnp.float32) for x in (keep, new, start)))
    np.testing.assert_allclose(h, by_hand(keep, new, start), rtol=1e-5, atol=1e-5)
    d_keep, d_new, d_start = (np.asarray(x) for x in back(jnp.asarray(dh, jnp.float32)))
    expected, carried = np.zeros_like(new), np.zeros((B, D))
    for t in reversed(range(T)):
        expected[:, t] = dh[:, t] + carried
        carried = keep[:, t] * expected[:, t]
    before = np.concatenate([start[:, None], by_hand(keep, new, start)[:, :-1]], axis=1)
    np.testing.assert_allclose(d_new, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_keep, expected * before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_start, carried, rtol=1e-4, atol=1e-5)
    behind = np.where(np.arange(T)[None, :, None] >= 7, dh, 0.0)
    assert not np.asarray(back(jnp.asarray(behind, jnp.float32))[2]).any()  # nothing crosses a document's beginning


def routed(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and boundaries in float64, from states that are their own queries and keys."""
    probability = np.ones((B, T))
    for b in range(B):
        for t in range(1, T):
            q, k = states[b, t - 1], states[b, t]
            cosine = q @ k / np.linalg.norm(q) / np.linalg.norm(k)
            probability[b, t] = 1.0 if STARTS_BT[b, t] else (1 - cosine) / 2
    return probability, (probability > 0.5) & (SEGMENTS_BT > 0)


STATES_BTD = RNG.normal(size=(B, T, D))
NOTHING = jnp.zeros((B, D), jnp.float32)


def ours(states: Any, capacity: int) -> tuple[Any, Any, chunking.Chunks]:
    probability = chunking.boundary_probability(states, states, jnp.asarray(STARTS_BT), NOTHING)
    boundary = chunking.boundaries(probability, jnp.asarray(SEGMENTS_BT))
    inputs = states, probability, boundary, jnp.asarray(STARTS_BT), jnp.asarray(SEGMENTS_BT)
    return probability, boundary, chunking.chunk(*inputs, capacity)


def test_where_chunks_begin() -> None:
    probability, boundary, _ = ours(jnp.asarray(STATES_BTD, jnp.float32), T)
    expected, wanted = routed(STATES_BTD)
    np.testing.assert_allclose(probability, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(boundary, wanted)
    assert boundary[STARTS_BT].all()
    assert not np.asarray(boundary)[SEGMENTS_BT == 0].any()


def test_chunks_in_their_places() -> None:
    _, boundary, chunks = ours(jnp.asarray(STATES_BTD, jnp.float32), T)
    for b in range(B):
        places = np.flatnonzero(np.asarray(boundary)[b])
        count = len(places)
        np.testing.assert_allclose(chunks.states_BMD[b, :count], STATES_BTD[b, places], rtol=1e-6)
        np.testing.assert_array_equal(chunks.segment_ids_BM[b, :count], SEGMENTS_BT[b, places])
        assert not np.asarray(chunks.segment_ids_BM)[b, count:].any()
        np.testing.assert_array_equal(chunks.starts_BM[b, :count], STARTS_BT[b, places])
    assert chunks.overflow == 0


def smoothed(outputs: np.ndarray, probability: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    out = np.zeros((B, T, D))
    for b in range(B):
        slot, z = -1, np.zeros(D)
        for t in range(T):
            if boundary[b, t]:
                slot += 1
                q = 1.0 if STARTS_BT[b, t] else np.clip(probability[b, t], 1e-4, 1 - 1e-4)
                z = q * outputs[b, slot] + (1 - q) * z
            out[b, t] = z if SEGMENTS_BT[b, t] else 0.0
    return out


def test_what_positions_get_back() -> None:
    outputs = RNG.normal(size=(B, T, D))
    probability, boundary, chunks = ours(jnp.asarray(STATES_BTD, jnp.float32), T)
    given = jnp.asarray(outputs, jnp.float32), chunks, jnp.asarray(SEGMENTS_BT), NOTHING
    found, last = chunking.dechunk(*given)
    np.testing.assert_allclose(last[0], found[0, -1], rtol=1e-6)
    np.testing.assert_allclose(
        found, smoothed(outputs, np.asarray(probability, np.float64), np.asarray(boundary)), rtol=1e-5, atol=1e-5
    )


def test_a_small_capacity_drops_the_latest_chunks_and_counts_them() -> None:
    states = jnp.asarray(STATES_BTD, jnp.float32)
    _, boundary, whole = ours(states, T)
    counts = np.asarray(boundary).sum(axis=1)
    capacity = int(counts.min()) - 2
    _, _, small = ours(states, capacity)
    assert small.overflow == (counts - capacity).sum()
    np.testing.assert_array_equal(small.states_BMD, whole.states_BMD[:, :capacity])
    outputs = jnp.ones((B, capacity, D), jnp.float32)
    back = np.asarray(chunking.dechunk(outputs, small, jnp.asarray(SEGMENTS_BT), NOTHING)[0])
    lost = np.asarray(whole.of_BT) >= capacity
    assert not back[lost].any()
    np.testing.assert_allclose(back[~lost & (SEGMENTS_BT > 0)], 1.0, rtol=1e-5)


def test_nothing_comes_from_behind_or_from_another_document() -> None:
    """The gradient of what a position gets back, by the states of all others, with the chunks where they are."""

    def got(states: Any, b: int, t: int) -> Any:
        _, _, chunks = ours(states, T)
        return jnp.sum(chunking.dechunk(chunks.states_BMD, chunks, jnp.asarray(SEGMENTS_BT), NOTHING)[0][b, t])

    gradient = jax.jit(jax.grad(got), static_argnums=(1, 2))
    for b, t in ((0, 6), (0, 17), (1, 15)):
        reached = np.abs(np.asarray(gradient(jnp.asarray(STATES_BTD, jnp.float32), b, t))).sum(axis=-1)
        allowed = (SEGMENTS_BT[b, t] == SEGMENTS_BT) & (np.arange(T) <= t)[None, :]
        allowed[1 - b] = False
        assert reached[allowed].any()
        # The router compares with the position before, which may be the last of another document: it is not used there.
        assert not reached[~allowed].any()


def test_the_ratio_loss_is_1_at_its_target_and_is_the_papers() -> None:
    probability, boundary = routed(STATES_BTD)
    real = SEGMENTS_BT > 0
    share, mean, n = boundary[real].mean(), probability[real].mean(), 4.0
    expected = n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))
    given = jnp.asarray(probability, jnp.float32), jnp.asarray(boundary), jnp.asarray(SEGMENTS_BT)
    assert float(chunking.ratio_loss(*given, n)) == pytest.approx(expected, rel=1e-5)
    even = jnp.full((1, 8), 0.25), jnp.asarray([[True, False, False, False] * 2]), jnp.ones((1, 8), jnp.int32)
    assert float(chunking.ratio_loss(*even, 4.0)) == pytest.approx(1.0)


def test_the_confidence_is_1_and_has_the_gradient_of_what_was_decided() -> None:
    probability, boundary = jnp.asarray([[0.9, 0.2]]), jnp.asarray([[True, False]])
    np.testing.assert_allclose(chunking.confidence(probability, boundary), 1.0, rtol=1e-6)
    gradient = jax.grad(lambda p: jnp.sum(chunking.confidence(p, boundary)))(probability)
    np.testing.assert_allclose(gradient, [[1.0, -1.0]], rtol=1e-6)
