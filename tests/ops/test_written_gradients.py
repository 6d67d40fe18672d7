"""Dense products and RMSNorm: their written-out gradients against those that jax derives from the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.ops.linear import linear
from smallcoder_jax.ops.rms_norm import rms_norm


def draw(*shapes, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def plain_linear(x, kernel):
    return jnp.einsum("bti,io->bto", x, kernel, precision="highest")


def plain_rms_norm(x, scale):
    return scale[None, None, :] * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-2)


@pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [(linear, plain_linear, (16, 7)), (lambda x, scale: rms_norm(x, scale, 1e-2), plain_rms_norm, (16,))],
)
def test_values_and_gradients_equal_those_of_the_formula(ours, plain, shape):
    x, parameter = draw((3, 5, 16), shape)
    (got, got_pull), (want, want_pull) = jax.vjp(ours, x, parameter), jax.vjp(plain, x, parameter)
    np.testing.assert_allclose(got, want, atol=1e-5)
    (dy,) = draw(want.shape, seed=1)
    for a, b in zip(got_pull(dy), want_pull(dy), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_activations_give_float32_gradients_to_float32_parameters():
    x, dy = draw((2, 64, 16), (2, 64, 8), dtype=jnp.bfloat16)
    (kernel,) = draw((16, 8), seed=1)
    y, pull = jax.vjp(linear, x, kernel)
    dx, d_kernel = pull(dy)
    assert (y.dtype, dx.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("bti,bto->io", *(np.asarray(value, np.float64) for value in (x, dy)))
    np.testing.assert_allclose(d_kernel, exact, atol=1e-4)  # rounded to bfloat16 on the way, it would be off by 0.05


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x, dy = draw((2, 64, 16), (2, 64, 16), dtype=jnp.bfloat16)
    scale = jnp.linspace(0.5, 2.0, 16)
    y, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-2), x, scale)
    want, want_pull = jax.vjp(plain_rms_norm, x.astype(jnp.float32), scale)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))
    dx, d_scale = pull(dy)
    want_dx, want_d_scale = want_pull(dy.astype(jnp.float32))
    np.testing.assert_allclose(np.asarray(dx, np.float32), want_dx, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(d_scale, want_d_scale, atol=1e-4)
