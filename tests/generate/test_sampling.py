"""Choosing a token, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.generate.sampling import SamplingOptions, Settings, best, choose, penalise, probabilities


def settings(rows, *, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0) -> Settings:
    return Settings(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, penalty, jnp.float32),
    )


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def expected_probabilities(logits, temperature, top_k, top_p):
    """By sorting, in float64, one row at a time."""
    rows = []
    for row in np.asarray(logits, np.float64):
        scaled = row / temperature
        order = np.argsort(-scaled)
        kept = order[: top_k or len(order)]
        p = softmax(scaled[kept])
        before = np.cumsum(p) - p
        kept = kept[before < top_p] if top_p < 1 else kept
        out = np.zeros_like(scaled)
        out[kept] = softmax(scaled[kept])
        rows.append(out)
    return np.stack(rows)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.9), (0, 0.01), (20, 0.7), (999, 0.5)])
def test_probabilities_are_those_of_a_sort(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(size=(6, 300)).astype(np.float32) * 3 - 2
    got = probabilities(jnp.asarray(logits), settings(6, temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(got, expected_probabilities(logits, temperature, top_k, top_p), rtol=2e-4, atol=1e-7)


def test_every_row_has_its_own_settings():
    logits = np.random.default_rng(4).normal(size=(3, 50)).astype(np.float32)
    mixed = Settings(
        jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray([3, 0, 10]), jnp.asarray([1.0, 0.4, 0.8]), jnp.ones(3, jnp.float32)
    )
    got = probabilities(jnp.asarray(logits), mixed)
    for row, (t, k, p) in enumerate([(0.5, 3, 1.0), (1.0, 0, 0.4), (2.0, 10, 0.8)]):
        np.testing.assert_allclose(got[row], expected_probabilities(logits[[row]], t, k, p)[0], rtol=2e-4, atol=1e-7)


def test_best_orders_negative_scores_zeros_and_infinities():
    scores = jnp.asarray([[-jnp.inf, -3.0, -0.5, 0.0, 2.0, 1e30]])
    for k, first_kept in [(1, 5), (2, 4), (3, 3), (4, 2), (5, 1), (6, 0)]:
        kept = best(scores, jnp.ones_like(scores), jnp.asarray([float(k)]))
        assert np.flatnonzero(kept[0]).tolist() == list(range(first_kept, 6))


def test_best_keeps_ties_of_the_last_one_and_all_when_there_is_too_little():
    scores = jnp.asarray([[1.0, 2.0, 1.0, 0.0]])
    assert best(scores, jnp.ones_like(scores), jnp.asarray([2.0]))[0].tolist() == [True, True, True, False]
    assert best(scores, jnp.ones_like(scores), jnp.asarray([9.0])).all()


def test_penalty_divides_positive_and_multiplies_negative_scores_of_seen_tokens():
    logits = jnp.asarray([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.asarray([[True, True, False, False]])
    np.testing.assert_allclose(penalise(logits, seen, jnp.asarray([1.25])), [[1.6, -2.5, 2.0, -2.0]], rtol=1e-6)


def draw(logits, rows, **values):
    keys = jax.random.split(jax.random.key(0), rows)
    scores = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    unseen, allowed = jnp.zeros(scores.shape, bool), jnp.zeros(len(logits), bool)
    return np.asarray(choose(scores, unseen, allowed, settings(rows, **values), keys))


def test_draws_are_as_frequent_as_their_probabilities():
    logits = [0.0, 2.0, -1.0, 1.0, 1.5, -9.0]
    rows = 20_000
    counts = np.bincount(draw(logits, rows, temperature=0.8, top_p=0.95), minlength=6) / rows
    expected = expected_probabilities([logits], 0.8, 0, 0.95)[0]
    assert counts[expected == 0].sum() == 0
    np.testing.assert_allclose(counts, expected, atol=4 * 0.5 / rows**0.5)


def test_temperature_0_takes_the_best_and_a_tiny_temperature_agrees():
    logits = [0.0, 2.0, -1.0, 1.999]
    assert set(draw(logits, 50, temperature=0.0)) == {1}
    assert set(draw(logits, 50, temperature=1e-30)) == {1}


def test_greedy_and_sampled_rows_share_a_batch():
    logits = jnp.zeros((400, 4), jnp.float32).at[:, 2].set(0.1)
    values = settings(400)._replace(temperature_B=jnp.asarray([0.0, 1.0] * 200))
    keys = jax.random.split(jax.random.key(1), 400)
    chosen = np.asarray(choose(logits, jnp.zeros((400, 4), bool), jnp.zeros(4, bool), values, keys))
    assert set(chosen[::2]) == {2}
    assert set(chosen[1::2]) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_suppressed_token_is_never_chosen_however_likely(temperature):
    logits = jnp.tile(jnp.asarray([[0.0, 90.0, 0.0]]), (200, 1))
    keys = jax.random.split(jax.random.key(2), 200)
    suppressed = jnp.asarray([False, True, False])
    chosen = choose(logits, jnp.zeros((200, 3), bool), suppressed, settings(200, temperature=temperature), keys)
    assert not (np.asarray(chosen) == 1).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**32},
        {"num_samples": 0},
        {"stop": ("",)},
        {"stop": "\n"},
    ],
)
def test_an_option_outside_its_range_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingOptions(**wrong)
