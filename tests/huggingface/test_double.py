"""A float32 program is computed in float64 without being changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from smallcoder_jax.huggingface.double import in_float64
from smallcoder_jax.ops.recurrence import recurrence
from smallcoder_jax.ops.rms_norm import rms_norm
from smallcoder_jax.ops.ternary import quantized_kernel

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
ONES = np.ones((8,), np.float32)


def test_what_is_float32_becomes_float64() -> None:
    def norm(x: Array) -> Array:
        return rms_norm(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.asarray(ONES), 1e-6)

    found = in_float64(norm)(X)
    wide = X.astype(np.float64)  # not rounded to bfloat16
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + np.float64(np.float32(1e-6)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_what_is_rounded_on_purpose_stays_rounded() -> None:
    signs, unit = in_float64(quantized_kernel)(X[0])
    assert signs.dtype == np.int8
    assert set(np.unique(signs)) <= {-1, 0, 1}
    assert float(unit) == pytest.approx(np.mean(np.abs(X[0].astype(np.float64))), rel=1e-15)


def test_scans_branches_and_scatters() -> None:
    def function(x: Array, choice: Array) -> tuple[Array, Array]:
        h = recurrence(jnp.full_like(x, 0.5), x, jnp.ones_like(x[:, 0]))
        chosen = jax.lax.cond(choice > 0, lambda: h, lambda: -h)
        _, sums = jax.lax.scan(lambda carry, step: (carry + step, carry + step), jnp.float32(0.0), chosen[0, :, 0])
        return h, sums

    h, sums = in_float64(function)(X, jnp.int32(1))
    expected, state = [], np.ones((2, 8))
    for step in range(5):
        state = 0.5 * state + X[:, step].astype(np.float64)
        expected.append(state)
    np.testing.assert_allclose(h, np.stack(expected, axis=1), rtol=1e-14)
    np.testing.assert_allclose(sums, np.cumsum(h[0, :, 0]), rtol=1e-14)


def test_one_compilation_for_each_shape() -> None:
    traced = []

    def function(x: Array) -> Array:
        traced.append(x.shape)
        return x * 2.0

    computed = in_float64(function)
    for length in (2, 3, 2):
        np.testing.assert_array_equal(computed(X[:, :length]), 2.0 * X[:, :length])
    assert traced == [(2, 2, 8), (2, 3, 8)]
