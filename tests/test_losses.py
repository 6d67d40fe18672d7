"""The losses of every stage against their definitions, written out in numpy, float64, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smallcoder_jax import losses
from smallcoder_jax.mesh import AXES, TOKENS, on_mesh
from smallcoder_jax.ops import divergence
from tests.helpers import CAPTURES

GENERATOR = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_by_hand(student: list[jax.Array], teacher: list[jax.Array], temperature: float) -> np.ndarray:
    mine, theirs = (
        log_softmax(np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T / temperature)
        for hidden, unembed in (student, teacher)
    )
    return (np.exp(theirs) * (theirs - mine)).sum(axis=-1)


@pytest.fixture
def models() -> tuple[list[jax.Array], list[jax.Array]]:
    return [draw(24, 8), draw(50, 8)], [draw(24, 12), draw(50, 12)]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_distillation_is_its_definition(models, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_chunk", lambda vocabulary: chunk)
    (hidden, unembed), teacher = models
    targets, weights = jnp.arange(24) % 50, jnp.asarray(GENERATOR.uniform(size=24), jnp.float32)
    found = divergence.divergences(hidden, unembed, *teacher, 2.0)
    loss, weight, sums = losses.distillation(hidden, unembed, found, targets, weights, alpha=0.3, temperature=2.0)
    kl = kl_by_hand([hidden, unembed], teacher, 2.0)
    nll = -log_softmax(np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T)[np.arange(24), targets]
    wanted = np.sum(np.asarray(weights, np.float64) * (0.3 * nll + 0.7 * 4.0 * kl))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(sums["kl"], np.sum(weights * kl), rtol=1e-5)
    assert float(weight) == pytest.approx(float(weights.sum()))


@pytest.mark.parametrize("chunk", [5, 100])
def test_the_gradient_of_a_divergence_is_that_of_its_definition(models, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "_chunk", lambda vocabulary: chunk)
    (hidden, unembed), teacher = models
    weights = draw(24)

    def written_out(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        student, theirs = (
            jax.nn.log_softmax(jnp.matmul(h, u.T, precision="highest") / 3.0) for h, u in ((hidden, unembed), teacher)
        )
        return jnp.sum(jnp.sum(jnp.exp(theirs) * (theirs - student), axis=-1) * weights)

    def ours(hidden: jax.Array, unembed: jax.Array, teacher_hidden: jax.Array) -> jax.Array:
        return jnp.sum(divergence.divergences(hidden, unembed, teacher_hidden, teacher[1], 3.0) * weights)

    want = jax.grad(written_out, (0, 1))(hidden, unembed)
    *got, of_teacher = jax.grad(ours, (0, 1, 2))(hidden, unembed, teacher[0])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not of_teacher.any()


@CAPTURES
@pytest.mark.parametrize("count", [0, 6])
def test_a_divergence_on_a_mesh(models, count: int) -> None:
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2, 1), AXES)
    (hidden, unembed), teacher = models

    def total(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        if count:
            kl = divergence.top_divergences(hidden, unembed, *divergence.top_tokens(*teacher, count, 2.0), 2.0)
        else:
            kl = divergence.divergences(hidden, unembed, *teacher, 2.0)
        return jnp.sum(jnp.sin(kl))

    want = jax.value_and_grad(total, (0, 1))(hidden, unembed)
    shardings = NamedSharding(mesh, TOKENS), NamedSharding(mesh, P("tensor", "fsdp"))
    step = jax.jit(
        on_mesh(mesh, jax.value_and_grad(total, (0, 1))),
        in_shardings=shardings,
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    got = step(hidden, unembed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def top_kl_by_hand(student: list[jax.Array], teacher: list[jax.Array], count: int, temperature: float) -> np.ndarray:
    """Of the teacher's likeliest tokens, and of the sum of all others."""
    mine, theirs = (
        np.exp(log_softmax(np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T / temperature))
        for hidden, unembed in (student, teacher)
    )
    found = []
    for p, q in zip(theirs, mine, strict=True):
        order = np.argsort(-p)
        top, rest = order[:count], order[count:]
        terms = [p[i] * np.log(p[i] / q[i]) for i in top]
        if len(rest):
            terms.append(p[rest].sum() * np.log(p[rest].sum() / q[rest].sum()))
        found.append(sum(terms))
    return np.array(found)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("count", [1, 6, 49, 50])
def test_the_divergence_of_the_likeliest_tokens_is_its_definition(
    models, count: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_chunk", lambda vocabulary: chunk)
    student, teacher = models
    ids, log_probs = divergence.top_tokens(*teacher, count, 2.0)
    found = divergence.top_divergences(*student, ids, log_probs, 2.0)
    np.testing.assert_allclose(found, top_kl_by_hand(student, teacher, count, 2.0), atol=1e-5)
    whole = divergence.divergences(*student, *teacher, 2.0)
    assert np.all(np.asarray(found) <= np.asarray(whole) + 1e-5)
    if count == 50:
        np.testing.assert_allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("count", [1, 6, 50])
def test_the_gradient_of_the_divergence_of_the_likeliest_tokens(
    models, count: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_chunk", lambda vocabulary: chunk)
    (hidden, unembed), teacher = models
    weights = draw(24)
    ids, log_probs = divergence.top_tokens(*teacher, count, 3.0)
    is_top = jnp.zeros((24, 50), bool).at[jnp.arange(24)[:, None], ids].set(True)

    def written_out(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        theirs, mine = (
            jax.nn.softmax(jnp.matmul(h, u.T, precision="highest") / 3.0) for h, u in (teacher, (hidden, unembed))
        )
        of_top = jnp.sum(jnp.where(is_top, theirs * jnp.log(theirs / mine), 0.0), axis=-1)
        if count == 50:
            return jnp.sum(of_top * weights)
        rest, my_rest = (jnp.sum(jnp.where(is_top, 0.0, p), axis=-1) for p in (theirs, mine))
        return jnp.sum((of_top + rest * jnp.log(rest / my_rest)) * weights)

    def ours(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        return jnp.sum(divergence.top_divergences(hidden, unembed, ids, log_probs, 3.0) * weights)

    want, got = (jax.grad(function, (0, 1))(hidden, unembed) for function in (written_out, ours))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_model_does_not_diverge_from_itself(models) -> None:
    student, _ = models
    np.testing.assert_allclose(divergence.divergences(*student, *student, 1.5), 0.0, atol=1e-6)


def test_the_mean_of_a_distillation_does_not_change_with_length_or_padding(models) -> None:
    (hidden, unembed), (teacher_hidden, teacher_unembed) = models
    targets, weights = jnp.arange(24) % 50, jnp.ones(24)

    def mean(copies: int, padding: int) -> float:
        def grown(x: jax.Array) -> jax.Array:
            return jnp.concatenate([*[x] * copies, x[:padding]])

        counted = jnp.concatenate([*[weights] * copies, jnp.zeros(padding)])
        kl = divergence.divergences(grown(hidden), unembed, grown(teacher_hidden), teacher_unembed, 2.0)
        loss, weight, _ = losses.distillation(
            grown(hidden), unembed, kl, grown(targets), counted, alpha=0.5, temperature=2.0
        )
        return float(loss / weight)

    assert mean(3, 0) == pytest.approx(mean(1, 0), rel=1e-5)
    assert mean(1, 9) == pytest.approx(mean(1, 0), rel=1e-5)


def test_pairs_of_rewards() -> None:
    chosen, rejected, weights = draw(9), draw(9), jnp.asarray([1.0] * 8 + [0.0])
    loss, weight, sums = losses.bradley_terry(chosen, rejected, weights)
    margin = (np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64))[:8]
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)).sum(), rtol=1e-5)
    assert (float(weight), float(sums["accuracy"])) == (8.0, (margin > 0).sum())
    np.testing.assert_allclose(sums["margin"], margin.sum(), rtol=1e-5)


def test_direct_preference_is_its_definition() -> None:
    logs = [draw(6) for _ in range(4)]
    loss, weight, sums = losses.direct_preference(*logs, jnp.ones(6), beta=0.1)
    chosen, rejected, chosen_before, rejected_before = (np.asarray(x, np.float64) for x in logs)
    ratio = (chosen - chosen_before) - (rejected - rejected_before)
    np.testing.assert_allclose(loss, -np.log(1 / (1 + np.exp(-0.1 * ratio))).sum(), rtol=1e-5)
    assert float(weight) == 6
    apart = {
        "chosen_log_prob": chosen,
        "rejected_log_prob": rejected,
        "chosen_reward": 0.1 * (chosen - chosen_before),
        "rejected_reward": 0.1 * (rejected - rejected_before),
    }
    for name, values in apart.items():
        np.testing.assert_allclose(sums[name], values.sum(), rtol=1e-4)
    assert float(sums["margin"]) == pytest.approx(float(sums["chosen_reward"] - sums["rejected_reward"]), abs=1e-5)
    start, _, _ = losses.direct_preference(*logs[:2], *logs[:2], jnp.ones(6), beta=0.1)
    assert float(start) == pytest.approx(6 * np.log(2))


def test_generalized_advantages_are_the_weighted_sum_of_errors_to_come() -> None:
    gamma, decay, lengths = 0.9, 0.8, (5, 1, 7, 0)
    rewards, values = draw(4, 7), draw(4, 7)
    real = jnp.arange(7)[None, :] < jnp.asarray(lengths)[:, None]
    advantages, returns = losses.generalized_advantages(rewards, values, real, gamma=gamma, decay=decay)
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    for row, length in enumerate(lengths):
        errors = [
            r[row, t] + gamma * (v[row, t + 1] if t + 1 < length else 0.0) - v[row, t] for t in range(length)
        ]  # fmt: skip
        for t in range(7):
            wanted = sum((gamma * decay) ** (k - t) * errors[k] for k in range(t, length)) if t < length else 0.0
            assert float(advantages[row, t]) == pytest.approx(wanted, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(wanted + v[row, t] if t < length else 0.0, abs=1e-5)


def test_a_ratio_beyond_the_clip_earns_nothing_more() -> None:
    ratios, advantages = jnp.asarray([0.5, 0.9, 1.0, 1.1, 1.5] * 2), jnp.asarray([1.0] * 5 + [-1.0] * 5)
    old = draw(10)
    log_probs = old + jnp.log(ratios)

    def loss_of(log_probs: jax.Array) -> jax.Array:
        return losses.clipped_policy(log_probs, old, advantages, jnp.ones(10), clip=0.2)[0]

    wanted = -sum(min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantages, strict=True))
    np.testing.assert_allclose(loss_of(log_probs), wanted, rtol=1e-5)
    flat = np.asarray(jax.grad(loss_of)(log_probs)) == 0
    np.testing.assert_array_equal(flat, [False] * 4 + [True] + [True] + [False] * 4)
    _, weight, sums = losses.clipped_policy(log_probs, old, advantages, jnp.ones(10), clip=0.2)
    assert (float(weight), float(sums["clipped"])) == (10.0, 4.0)
    assert float(sums["kl"]) > 0
    np.testing.assert_allclose(sums["ratio"], ratios.sum(), rtol=1e-5)


def test_a_value_beyond_the_clip_is_held_back() -> None:
    values, old, returns = draw(8), draw(8), draw(8)
    loss, weight = losses.clipped_value(values, old, returns, jnp.ones(8), clip=0.2)
    wanted = 0.0
    for value, before, aim in zip(*(np.asarray(x, np.float64) for x in (values, old, returns)), strict=True):
        held = before + min(max(value - before, -0.2), 0.2)
        wanted += 0.5 * max((value - aim) ** 2, (held - aim) ** 2)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert float(weight) == 8


def test_a_group_is_its_own_measure() -> None:
    rewards = jnp.asarray([[0.0, 1.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    advantages = losses.group_advantages(rewards, smallest_deviation=0.05)
    np.testing.assert_allclose(advantages[0], [-1, 1, -1, 1], atol=1e-3)
    np.testing.assert_array_equal(advantages[1], 0.0)
    np.testing.assert_allclose(advantages[2], np.asarray([-1, -1, -1, 3]) / np.sqrt(3), atol=1e-3)


def test_rewards_that_hardly_differ_hardly_count() -> None:
    rewards = jnp.asarray([[0.5, 0.501], [0.4, 0.6]])
    advantages = losses.group_advantages(rewards, smallest_deviation=0.05)
    np.testing.assert_allclose(advantages, [[-0.01, 0.01], [-1.0, 1.0]], atol=1e-4)


def test_the_estimate_of_a_divergence_has_the_right_mean() -> None:
    model, reference = (log_softmax(GENERATOR.normal(size=6)) for _ in range(2))
    drawn = GENERATOR.choice(6, size=200_000, p=np.exp(model))
    total, weight = losses.reference_divergence(
        jnp.asarray(model[drawn], jnp.float32), jnp.asarray(reference[drawn], jnp.float32), jnp.ones(len(drawn))
    )
    wanted = (np.exp(model) * (model - reference)).sum()
    assert float(total / weight) == pytest.approx(wanted, rel=0.02)
