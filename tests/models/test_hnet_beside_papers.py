"""Whole byte-level models against a float64 reference that is written out from the papers, position by position.

H-Net: arXiv 2507.07955; ternary weights: 2402.17764; the recurrence: 2404.07904 and 2406.02528. The reference knows one
document, no batch and no packing. Rounding at a half can differ between float32 and float64, and moves an activation by
1/127 of the largest: values are compared by norm.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import HnetConfig
from smallcoder_jax.models import build
from tests.helpers import FLOAT32
from tests.models.test_hnet import SHAPES, made

pytestmark = pytest.mark.usefixtures("standard_promotion")

T = 14
TOKENS = np.random.default_rng(2).integers(0, 256, T)


def norm(x: Any, scale: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def same_gradient(value: Any, x: Any) -> Any:
    """`value`, with the gradient of the identity on `x`."""
    return x + jax.lax.stop_gradient(value - x)


def bit_linear(layer: Any, x: Any) -> Any:
    x, kernel = norm(x, layer["gain"]), layer["kernel"]
    s = 127 / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-5)
    t = 1 / jnp.maximum(jnp.mean(jnp.abs(kernel)), 1e-5)
    x_q = same_gradient(jnp.clip(jnp.round(s * x), -128, 127) / s, x)
    return x_q @ same_gradient(jnp.clip(jnp.round(t * kernel), -1, 1) / t, kernel)


def silu(x: Any) -> Any:
    return x / (1 + jnp.exp(-x))


def block(layer: Any, x_TD: Any) -> Any:
    mixer, normed = layer["mixer"], norm(x_TD, layer["mixer_norm"]["scale"])
    forget = 1 / (1 + jnp.exp(-bit_linear(mixer["forget"], normed)))
    new = silu(bit_linear(mixer["value"], normed)) * (1 - forget)
    h, states = jnp.zeros(x_TD.shape[1]), []
    for t in range(len(x_TD)):
        h = forget[t] * h + new[t]
        states.append(h)
    gated = norm(bit_linear(mixer["gate"], normed), mixer["gate_norm"]["scale"]) * silu(jnp.stack(states))
    x_TD = x_TD + bit_linear(mixer["output"], gated)
    gate, up = jnp.split(bit_linear(layer["mlp"]["up"], norm(x_TD, layer["mlp_norm"]["scale"])), 2, axis=-1)
    return x_TD + bit_linear(layer["mlp"]["down"], silu(gate) * up)


def stack(layers: Any, x_TD: Any) -> Any:
    for i in range(len(layers["blocks"])):
        x_TD = block(layers["blocks"][i], x_TD)
    return norm(x_TD, layers["final_norm"]["scale"])


def stage(params: Any, x_TD: Any, target: float) -> tuple[Any, Any]:
    """The stage's output, and the sum of the ratio losses of it and of those within."""
    if "stack" in params:
        return stack(params["stack"], x_TD), 0.0
    encoded = stack(params["encoder"], x_TD)
    probability = [jnp.float64(1.0)]
    for t in range(1, len(encoded)):
        q, k = encoded[t - 1] @ params["router"]["query"], encoded[t] @ params["router"]["key"]
        probability.append((1 - q @ k / jnp.linalg.norm(q) / jnp.linalg.norm(k)) / 2)
    begins = [t for t in range(len(encoded)) if probability[t] > 0.5]
    wider = jnp.broadcast_to(params["wider"], (len(begins), len(params["wider"])))
    within, losses = stage(params["inner"], jnp.concatenate([encoded[jnp.array(begins)], wider], axis=1), target)
    z, out = jnp.zeros(encoded.shape[1]), []
    for t in range(len(encoded)):
        if t in begins:
            q = 1.0 if t == 0 else jnp.clip(probability[t], 1e-4, 1 - 1e-4)
            z = q * within[begins.index(t), : encoded.shape[1]] + (1 - q) * z
        decided = probability[t] if t in begins else 1 - probability[t]
        out.append(z * same_gradient(1.0, decided))
    mixed = jnp.stack(out) + encoded @ params["residual"]["kernel"] + params["residual"]["bias"]
    f, g = len(begins) / len(encoded), sum(probability) / len(encoded)
    own = target / (target - 1) * ((target - 1) * f * g + (1 - f) * (1 - g))
    return stack(params["decoder"], mixed), own + losses


def reference(model: HnetConfig, params: Any) -> tuple[Any, Any]:
    """Logits [T, V] and the model's own loss."""
    x_TD, ratio = stage(params["stage"], params["embed"]["embedding"][TOKENS], model.chunk_target)
    return bit_linear(params["head"], x_TD), model.ratio_weight * ratio


def ours(model: HnetConfig, params: Any) -> tuple[Any, Any]:
    module = build.bind(build.abstract_model(model, FLOAT32)[0], params)
    row = jnp.asarray(TOKENS[None], jnp.int32), jnp.arange(T, dtype=jnp.int32)[None], jnp.ones((1, T), jnp.int32)
    hidden = module(*row)
    total, weight = hidden.losses["ratio"]
    return build.logits(module, hidden.states_BTD)[0], total / weight


def loss(found: tuple[Any, Any]) -> Any:
    logits, own = found
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[jnp.arange(T), TOKENS[::-1].copy()]) + own


def apart(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / (np.linalg.norm(expected) + 1e-9))


@pytest.mark.parametrize("name", SHAPES)
def test_a_whole_model_and_its_gradients(name: str) -> None:
    model, params = SHAPES[name], made(SHAPES[name])
    logits, own = jax.jit(lambda params: ours(model, params))(params)
    gradient = jax.jit(jax.grad(lambda params: loss(ours(model, params))))(params)
    with jax.enable_x64():
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        expected, expected_own = reference(model, exact)
        expected_gradient = jax.grad(lambda params: loss(reference(model, params)))(exact)
    assert apart(logits, expected) < 0.01
    assert float(own) == pytest.approx(float(expected_own), rel=1e-3)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        assert apart(found, wanted) < 0.05, jax.tree_util.keystr(path)
