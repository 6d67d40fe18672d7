"""Whole byte-level models against a float64 reference that is written out from the papers, position by position.

H-Net: arXiv 2507.07955; ternary weights: 2402.17764; the recurrence: 2404.07904 and 2406.02528. The reference knows one
document, no batch and no packing, and computes attention one query at a time. Rounding at a half can differ between
float32 and float64, and moves an activation by 1/127 of the largest: values are compared by norm.
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


def dense(layer: Any, x: Any) -> Any:
    """A ternary layer, which has a gain, or a plain one."""
    kernel = layer["kernel"]
    if "gain" not in layer:
        return x @ kernel
    x = norm(x, layer["gain"])
    s = 127 / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-5)
    t = 1 / jnp.maximum(jnp.mean(jnp.abs(kernel)), 1e-5)
    x_q = same_gradient(jnp.clip(jnp.round(s * x), -128, 127) / s, x)
    return x_q @ same_gradient(jnp.clip(jnp.round(t * kernel), -1, 1) / t, kernel)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + jnp.exp(-x))


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def convolved(mixer: Any, name: str, x_TE: Any) -> Any:
    if name not in mixer:
        return x_TE
    taps = mixer[name]["taps"]
    return silu(jnp.stack([sum(taps[j] * x_TE[t - j] for j in range(min(len(taps), t + 1))) for t in range(len(x_TE))]))


def recurrence(mixer: Any, x_TD: Any) -> Any:
    x_TD = convolved(mixer, "conv", x_TD)
    forget = sigmoid(convolved(mixer, "forget_conv", dense(mixer["forget"], x_TD)))
    new = silu(convolved(mixer, "value_conv", dense(mixer["value"], x_TD))) * (1 - forget)
    h, states = jnp.zeros(new.shape[1]), []
    for t in range(len(x_TD)):
        h = forget[t] * h + new[t]
        states.append(h)
    return dense(
        mixer["output"], norm(dense(mixer["gate"], x_TD), mixer["gate_norm"]["scale"]) * silu(jnp.stack(states))
    )


def rotated(x_H: Any, t: int, theta: float) -> Any:
    half = len(x_H) // 2
    angle = t * theta ** (-jnp.arange(half) / half)
    first, second = x_H[:half], x_H[half:]
    return jnp.concatenate(
        [first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle)]
    )


def attention(model: HnetConfig, layers: Any, x_TD: Any) -> Any:
    size, group = x_TD.shape[1] // model.heads, model.heads // model.kv_heads
    queries, keys, values = (x_TD @ layers[name]["kernel"] for name in ("query", "key", "value"))
    out = []
    for t in range(len(x_TD)):
        heads = []
        for n in range(model.heads):
            q = rotated(queries[t, n * size : (n + 1) * size], t, model.rope_theta)
            place = slice(n // group * size, (n // group + 1) * size)
            seen = range(max(0, t - model.window + 1), t + 1)
            scores = jnp.stack([q @ rotated(keys[s, place], s, model.rope_theta) for s in seen]) / jnp.sqrt(size)
            heads.append(jax.nn.softmax(scores) @ jnp.stack([values[s, place] for s in seen]))
        out.append(jnp.concatenate(heads))
    return jnp.stack(out) @ layers["output"]["kernel"]


def block(model: HnetConfig, layer: Any, x_TD: Any) -> Any:
    mixer, normed = layer["mixer"], norm(x_TD, layer["mixer_norm"]["scale"])
    mixed = attention(model, mixer["attention"], normed) if "attention" in mixer else recurrence(mixer, normed)
    x_TD = x_TD + mixed
    gate, up = jnp.split(dense(layer["mlp"]["up"], norm(x_TD, layer["mlp_norm"]["scale"])), 2, axis=-1)
    return x_TD + dense(layer["mlp"]["down"], silu(gate) * up)


def stack(model: HnetConfig, layers: Any, x_TD: Any) -> Any:
    for i in range(len(layers["blocks"])):
        x_TD = block(model, layers["blocks"][i], x_TD)
    return norm(x_TD, layers["final_norm"]["scale"])


def stage(model: HnetConfig, params: Any, x_TD: Any) -> tuple[Any, Any]:
    """The stage's output, and the sum of the ratio losses of it and of those within."""
    if "stack" in params:
        return stack(model, params["stack"], x_TD), 0.0
    encoded = stack(model, params["encoder"], x_TD)
    probability = [jnp.float64(1.0)]
    for t in range(1, len(encoded)):
        q, k = encoded[t - 1] @ params["router"]["query"], encoded[t] @ params["router"]["key"]
        probability.append((1 - q @ k / jnp.linalg.norm(q) / jnp.linalg.norm(k)) / 2)
    begins = [t for t in range(len(encoded)) if probability[t] > 0.5]
    wider = jnp.broadcast_to(params["wider"], (len(begins), len(params["wider"])))
    within, losses = stage(model, params["inner"], jnp.concatenate([encoded[jnp.array(begins)], wider], axis=1))
    z, out = jnp.zeros(encoded.shape[1]), []
    for t in range(len(encoded)):
        if t in begins:
            q = 1.0 if t == 0 else jnp.clip(probability[t], 1e-4, 1 - 1e-4)
            z = q * within[begins.index(t), : encoded.shape[1]] + (1 - q) * z
        decided = probability[t] if t in begins else 1 - probability[t]
        out.append(z * same_gradient(1.0, decided))
    mixed = jnp.stack(out) + encoded @ params["residual"]["kernel"] + params["residual"]["bias"]
    f, g, target = len(begins) / len(encoded), sum(probability) / len(encoded), model.chunk_target
    own = target / (target - 1) * ((target - 1) * f * g + (1 - f) * (1 - g))
    return stack(model, params["decoder"], mixed), own + losses


def reference(model: HnetConfig, params: Any) -> tuple[Any, Any]:
    """Logits [T, V] and the model's own loss."""
    x_TD, ratio = stage(model, params["stage"], params["embed"]["embedding"][TOKENS])
    return dense(params["head"], x_TD), model.ratio_weight * ratio


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


@pytest.mark.parametrize(
    "name", ["flat", pytest.param("mixed", marks=pytest.mark.slow), pytest.param("staged", marks=pytest.mark.slow)]
)
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
