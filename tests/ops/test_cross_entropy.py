"""The hand-written cross-entropy against jax.nn, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax import losses
from smallcoder_jax.ops.cross_entropy import token_losses


def case(dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (33, 16)).astype(dtype)
    unembed = jax.random.normal(keys[1], (50, 16))
    return hidden, unembed, jax.random.randint(keys[2], (33,), 0, 50)


def plain(hidden, unembed, targets):
    logits = (hidden.astype(jnp.float32) @ unembed.T).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0], logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 5e-2)])
def test_values_and_gradients(dtype, tolerance):
    hidden, unembed, targets = case(dtype)
    weights = jnp.linspace(0.0, 2.0, 33)

    def ours(hidden, unembed):
        got = token_losses(hidden, unembed, targets)
        return jnp.sum(weights * got.nll_X + 0.1 * jnp.square(got.log_z_X))

    def reference(hidden, unembed):
        nll, logits = plain(hidden, unembed, targets)
        return jnp.sum(weights * nll + 0.1 * jnp.square(jax.nn.logsumexp(logits, axis=-1)))

    got, want = (jax.value_and_grad(f, (0, 1))(hidden, unembed) for f in (ours, reference))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.max(jnp.abs(b.astype(jnp.float32))))
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance * scale)
    assert got[1][0].dtype == dtype
    assert got[1][1].dtype == jnp.float32


def test_rank_counts_better_entries():
    hidden, unembed, targets = case(jnp.float32)
    order = np.argsort(-np.asarray(plain(hidden, unembed, targets)[1]), axis=1)
    targets = targets.at[0].set(int(order[0, 0]))
    want = [int(np.flatnonzero(order[i] == int(targets[i]))[0]) for i in range(33)]
    assert want[0] == 0
    assert max(want) > 0
    found = token_losses(hidden, unembed, targets)
    assert found.rank_X.tolist() == want
    assert found.best_X.tolist() == [rank == 0 for rank in want]


def test_bfloat16_logits_are_not_kept_in_float32():
    hidden, unembed, targets = case(jnp.bfloat16)
    _, pull = jax.vjp(lambda h: token_losses(h, unembed, targets).nll_X, hidden)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) == (33, 50)]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


def test_language_model_loss_is_a_weighted_sum():
    hidden, unembed, targets = case(jnp.float32)
    weights = jnp.where(jnp.arange(33) < 20, 1.0, 0.0)
    loss, weight, sums = losses.language_model(hidden, unembed, targets, weights, 0.0)
    nll, logits = plain(hidden, unembed, targets)
    np.testing.assert_allclose(loss, nll[:20].sum(), rtol=1e-5)
    assert float(weight) == 20
    assert float(sums["nats"]) == float(loss)
    assert float(sums["correct"]) == float((logits.argmax(-1) == targets)[:20].sum())
    assert float(sums["correct"]) <= float(sums["top5"]) <= 20
    with_z = losses.language_model(hidden, unembed, targets, weights, 0.5)[0]
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))[:20].sum()
    np.testing.assert_allclose(with_z - loss, 0.5 * z, rtol=1e-4)
