"""Entropies over the vocabulary and their gradient, against the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, NamedSharding

from smallcoder_jax.mesh import AXES, TOKENS, on_mesh
from smallcoder_jax.ops import entropy

GENERATOR = np.random.default_rng(0)
HIDDEN, UNEMBED, WEIGHTS = (
    jnp.asarray(GENERATOR.normal(size=shape), jnp.float32) for shape in ((24, 8), (50, 8), (24,))
)


def by_hand(hidden: Array, unembed: Array) -> Array:
    log_p = jax.nn.log_softmax(jnp.matmul(hidden, unembed.T, precision="highest"))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_it_is_the_definition_in_chunks_of_any_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "CHUNK_BYTES", 8 * 50 * chunk)
    np.testing.assert_allclose(entropy.entropies(HIDDEN, UNEMBED), by_hand(HIDDEN, UNEMBED), atol=1e-5)
    got = jax.grad(lambda *x: jnp.sum(entropy.entropies(*x) * WEIGHTS), (0, 1))(HIDDEN, UNEMBED)
    want = jax.grad(lambda *x: jnp.sum(by_hand(*x) * WEIGHTS), (0, 1))(HIDDEN, UNEMBED)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary() -> None:
    np.testing.assert_allclose(entropy.entropies(jnp.zeros((3, 8)), UNEMBED), np.log(50), rtol=1e-6)


def test_on_a_mesh_it_is_the_same() -> None:
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2, 1), AXES)
    split = jax.device_put(HIDDEN, NamedSharding(mesh, TOKENS))

    def total(hidden: Array, unembed: Array) -> Array:
        return jnp.sum(entropy.entropies(hidden, unembed))

    value, got = jax.jit(on_mesh(mesh, jax.value_and_grad(total, (0, 1))))(split, UNEMBED)
    np.testing.assert_allclose(value, by_hand(HIDDEN, UNEMBED).sum(), rtol=1e-5)
    for a, b in zip(got, jax.grad(total, (0, 1))(HIDDEN, UNEMBED), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
