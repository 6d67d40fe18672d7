"""The optimizer: schedules by step, decay by pattern, clipping, AdamW's and Muon's arithmetic."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import OptimizerConfig
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.optim import make_optimizer, orthogonalize, scale_by_muon, schedule
from tests.helpers import FLOAT32, max_difference, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

PLAIN = OptimizerConfig(
    learning_rate=0.1, weight_decay=0.0, clip_norm=0.0, schedule="constant", warmup_steps=0, eps=1e-8
)


def changed(**changes: Any) -> OptimizerConfig:
    return dataclasses.replace(PLAIN, **changes)


def shares(optimizer: OptimizerConfig, steps: int) -> list[float]:
    share = schedule(optimizer, steps)
    return [float(share(step)) for step in range(steps)]


def tiny_params(**changes: Any) -> Any:
    return jax.jit(lambda: build.init_params(tiny_model(**changes), FLOAT32, jax.random.key(0)))()


def run_steps(optimizer: OptimizerConfig, params: Any, gradients: list[Any]) -> Any:
    """The parameters after one optimizer step per entry of `gradients`."""
    chain = make_optimizer(optimizer, len(gradients), DECODER.muon)
    state = chain.init(params)
    for gradient in gradients:
        updates, state = chain.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_starts_above_zero_and_reaches_the_peak(name: str) -> None:
    values = shares(changed(schedule=name, warmup_steps=4, decay_steps=5), 20)
    np.testing.assert_allclose(values[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    assert values[4] == pytest.approx(1.0)


def test_cosine_and_linear_end_at_the_final_ratio_on_the_last_step() -> None:
    steps, warmup, final = 21, 4, 0.1
    cosine = shares(changed(schedule="cosine", warmup_steps=warmup, final_ratio=final), steps)
    linear = shares(changed(schedule="linear", warmup_steps=warmup, final_ratio=final), steps)
    done = (np.arange(warmup, steps) - warmup) / (steps - 1 - warmup)
    np.testing.assert_allclose(cosine[warmup:], final + 0.9 * 0.5 * (1 + np.cos(math.pi * done)), atol=1e-6)
    np.testing.assert_allclose(linear[warmup:], 1 - 0.9 * done, atol=1e-6)
    assert cosine[12] == pytest.approx(0.55)  # half of the way
    assert cosine[-1] == pytest.approx(final)
    assert linear[-1] == pytest.approx(final)


def test_constant_and_wsd() -> None:
    assert shares(changed(schedule="constant", final_ratio=0.1), 6) == [1.0] * 6
    values = shares(changed(schedule="wsd", warmup_steps=2, decay_steps=5, final_ratio=0.0), 20)
    np.testing.assert_allclose(values, [0.5] + [1.0] * 15 + [0.75, 0.5, 0.25, 0.0], atol=1e-6)


def test_adamw_against_its_definition() -> None:
    """Three steps in float64 numpy: Loshchilov and Hutter, 2019, algorithm 2, with clipping before it."""
    b1, b2, eps, decay, clip = 0.9, 0.95, 1e-6, 0.1, 1.5
    optimizer = changed(b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=clip, schedule="linear", final_ratio=0.0)
    generator = np.random.default_rng(0)
    start = {name: generator.normal(size=(5, 3)) for name in ("kernel", "scale")}
    gradients = [{name: generator.normal(size=(5, 3)) for name in start} for _ in range(3)]
    found = run_steps(
        optimizer,
        jax.tree.map(jnp.float32, start),
        [jax.tree.map(jnp.float32, gradient) for gradient in gradients],
    )

    expected = {name: value.copy() for name, value in start.items()}
    mean = {name: np.zeros((5, 3)) for name in start}
    square = {name: np.zeros((5, 3)) for name in start}
    for count, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradient.values()))
        assert norm > clip
        rate = 0.1 * (1.0, 0.5, 0.0)[count - 1]
        for name in start:
            g = gradient[name] * clip / norm
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            step = (mean[name] / (1 - b1**count)) / (np.sqrt(square[name] / (1 - b2**count)) + eps)
            expected[name] -= rate * (step + (decay * expected[name] if name == "kernel" else 0.0))
    assert max_difference(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_what_the_pattern_names_decays(name: str) -> None:
    params = tiny_params(norm="layernorm", bias="all")
    params = jax.tree.map(lambda x: x + 1.0, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = changed(name=name, weight_decay=0.5, muon_learning_rate=0.2, decay_pattern=r".*(kernel|embedding)$")
    after = run_steps(optimizer, params, [zeros])

    def factor(path: Any) -> float:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        if not names.endswith(("kernel", "embedding")):
            return 1.0
        is_muon = name == "muon" and names.startswith("blocks/")
        return 1.0 - (0.2 if is_muon else 0.1) * 0.5

    expected = jax.tree_util.tree_map_with_path(lambda path, x: x * factor(path), params)
    assert max_difference(after, expected) < 1e-6


def test_clipping_is_by_the_norm_of_all_gradients_together() -> None:
    gradient = {"a": jnp.full((4,), 3.0), "b": jnp.full((4,), 4.0)}  # norm 10
    for limit, factor in ((1.0, 0.1), (20.0, 1.0), (0.0, 1.0)):
        chain = make_optimizer(changed(clip_norm=limit), 10, DECODER.muon)
        _, state = chain.update(gradient, chain.init(gradient), gradient)
        moments = optax.tree_utils.tree_get(state, "mu")
        assert max_difference(moments, jax.tree.map(lambda g, f=factor: 0.1 * f * g, gradient)) < 1e-7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_not_sound_leaves_the_state_as_it_was(name: str) -> None:
    params = tiny_params()
    chain = make_optimizer(changed(name=name, weight_decay=0.1), 10, DECODER.muon)
    _, before = chain.update(params, chain.init(params), params)
    nothing = jax.tree.map(lambda x: x * jnp.nan, params)
    _, after = jax.jit(chain.update)(nothing, before, params, sound=jnp.bool_(False))
    assert len(jax.tree.leaves(before)) > len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_bad_decay_pattern_is_named() -> None:
    with pytest.raises(UserError, match=r"optimizer\.decay_pattern='\*kernel'"):
        make_optimizer(changed(decay_pattern="*kernel"), 1, DECODER.muon)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64), (3, 48, 80)])
def test_muon_makes_the_singular_values_one(shape: tuple[int, ...]) -> None:
    matrix = jax.random.normal(jax.random.key(0), shape)
    values = np.linalg.svd(np.asarray(orthogonalize(matrix)), compute_uv=False)
    # A square random matrix has singular values near 0, which five iterations do not lift all the way.
    low = 0.1 if shape[-1] == shape[-2] else 0.65
    assert low < values.min()
    assert np.median(values) > 0.7
    assert values.max() < 1.2


def test_muon_keeps_the_singular_vectors() -> None:
    matrix = np.random.default_rng(1).normal(size=(32, 80))
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ np.asarray(orthogonalize(jnp.float32(matrix))) @ vt.T
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-4
    assert np.diag(rotated).min() > 0.65


def test_muon_scales_by_the_shape() -> None:
    wide = {"kernel": jax.random.normal(jax.random.key(0), (32, 128))}
    muon = scale_by_muon(0.9)
    update, _ = muon.update(wide, muon.init(wide))
    assert max_difference(update["kernel"], 2.0 * orthogonalize(wide["kernel"])) < 1e-5


def test_muon_has_nesterov_momentum() -> None:
    momentum = 0.8
    first, second = jax.random.normal(jax.random.key(0), (2, 16, 40))
    muon = scale_by_muon(momentum)
    _, state = muon.update({"kernel": first}, muon.init({"kernel": first}))
    update, _ = muon.update({"kernel": second}, state)
    mean = momentum * (1 - momentum) * first + (1 - momentum) * second
    ahead = momentum * mean + (1 - momentum) * second
    assert max_difference(update["kernel"], (40 / 16) ** 0.5 * orthogonalize(ahead)) < 1e-5


def test_muon_groups_same_shapes_without_mixing_them() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (16, 24), "b": (24, 16), "c": (16, 24), "d": (16, 24)}
    tree = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    muon = scale_by_muon(0.9)
    together, _ = muon.update(tree, muon.init(tree))
    for name, leaf in tree.items():
        alone, _ = muon.update({name: leaf}, muon.init({name: leaf}))
        assert max_difference(together[name], alone[name]) < 1e-5


def test_muon_on_scanned_layers_equals_layer_by_layer() -> None:
    optimizer = changed(name="muon", weight_decay=0.1, warmup_steps=1)
    params = tiny_params()
    gradient = jax.tree.map(lambda x: jnp.sin(1e3 * x), params)
    unrolled = run_steps(optimizer, params, [gradient, params])
    scanned = run_steps(optimizer, build.to_scanned(params), [build.to_scanned(gradient), build.to_scanned(params)])
    assert max_difference(build.to_unrolled(scanned), unrolled) < 1e-5


def test_muon_takes_the_hidden_matrices_and_adam_the_rest() -> None:
    """Adam's first step has the size of its learning rate in every entry; Muon's is a scaled orthogonal matrix."""
    params = tiny_params()
    gradient = jax.tree.map(lambda x: 1.0 + jnp.abs(jnp.sin(1e3 * x)), params)
    after = run_steps(changed(name="muon", learning_rate=0.1, muon_learning_rate=0.02), params, [gradient])
    for path, (new, old) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda *pair: pair, after, params), is_leaf=lambda x: isinstance(x, tuple)
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        change = np.asarray(new - old)
        if name.startswith("blocks/") and name.endswith("kernel"):
            scale = 0.02 * max(1.0, change.shape[1] / change.shape[0]) ** 0.5
            assert 0.65 * scale < np.linalg.norm(change, 2) < 1.25 * scale, name
        else:
            np.testing.assert_allclose(change, -0.1, rtol=1e-3, err_msg=name)
