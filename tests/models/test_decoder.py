"""The decoder: counts, layouts, causality, packing, cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import ComputeConfig
from smallcoder_jax.configfile import load_config
from smallcoder_jax.mesh import spec_of
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder.cache import init_cache
from smallcoder_jax.models.decoder.sharding import RULES
from tests.helpers import CAPTURES, FLOAT32, max_difference, packed_batch, tiny_model

pytestmark = CAPTURES

SHAPES = {
    "smallcoder": tiny_model(),
    "untied": tiny_model(embeddings="untied"),
    "gpt2": tiny_model(norm="layernorm", positions="learned", mlp="gelu", bias="all", kv_heads=4),
    "biased swiglu": tiny_model(bias="all"),
    "window": tiny_model(window=4),
}


def made(model, compute=FLOAT32, seed=0):
    graph, _ = build.abstract_model(model, compute)
    params = jax.jit(lambda key: build.init_params(model, compute, key))(jax.random.key(seed))
    return build.bind(graph, params), params


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, params, batch, compute=FLOAT32, dropout_key=None):
    graph, _ = build.abstract_model(model, compute)
    decoder = build.bind(graph, params)
    names = ("tokens", "positions", "segment_ids")
    return build.logits(decoder, decoder(*(jnp.asarray(batch[name]) for name in names), dropout_key).states_BTD)


@pytest.mark.parametrize("name", SHAPES)
def test_count_by_arithmetic_is_the_true_count(name):
    _, params = made(SHAPES[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == SHAPES[name].parameter_count()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_layouts_and_rematerialisation_change_nothing(layers, remat):
    model = tiny_model()
    batch = packed_batch(model, 2, 32, seed=0)
    _, params = made(model)
    compute = ComputeConfig(dtype="float32", layers=layers, remat=remat)
    _, same = made(model, compute)
    assert max_difference(build.to_unrolled(same), params) == 0

    def loss(params, compute):
        return jnp.mean(jnp.square(forward(model, params, batch, compute)))

    gradient_of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want, want_gradient = gradient_of(params, FLOAT32)
    got, gradient = gradient_of(same, compute)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert max_difference(build.to_unrolled(gradient), want_gradient) < 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_causality_by_gradients(name):
    model = SHAPES[name]
    _, params = made(model)
    if model.embeddings == "tied":  # the output side of a tied embedding touches every row: cut it off
        model = dataclasses.replace(model, embeddings="untied")
        params = {**params, "unembed": {"kernel": params["embed"]["embedding"].T}}
    length, border = 12, 7
    batch = {
        "tokens": np.arange(3, 3 + length, dtype=np.int32)[None],
        "positions": np.arange(length, dtype=np.int32)[None],
        "segment_ids": np.array([[1] * border + [2] * (length - border)], np.int32),
    }

    @jax.jit
    def seen_by(t):
        """How strongly each token moves the logits at t: every token is its own entry of the embedding."""
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(forward(model, p, batch)[0, t])))(params)
        return jnp.sum(jnp.abs(gradient["embed"]["embedding"][3 : 3 + length]), axis=1)

    for t in range(length):
        strength = np.asarray(seen_by(t))
        start = 0 if t < border else border
        first = max(start, t - (model.window - 1) * model.layers) if model.window else start
        assert (strength[:first] == 0).all(), f"query {t} sees another document or beyond the window"
        assert (strength[t + 1 :] == 0).all(), f"query {t} sees the future"
        assert (strength[first : t + 1] > 0).all(), f"query {t} misses its past"


@pytest.mark.parametrize("name", SHAPES)
def test_logits_do_not_depend_on_what_a_document_is_packed_with(name):
    model = SHAPES[name]
    _, params = made(model)
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, model.vocab_size, n).astype(np.int32) for n in (9, 17, 1, 20)]

    def row(order):
        tokens = np.zeros((1, 64), np.int32)
        segments, positions, at, places = np.zeros_like(tokens), np.zeros_like(tokens), 0, {}
        for segment, index in enumerate(order, 1):
            n = len(documents[index])
            tokens[0, at : at + n], segments[0, at : at + n] = documents[index], segment
            positions[0, at : at + n], places[index] = np.arange(n), slice(at, at + n)
            at += n
        return {"tokens": tokens, "positions": positions, "segment_ids": segments}, places

    together, places = row([2, 0, 3, 1])
    logits = forward(model, params, together)
    for index in range(len(documents)):
        alone, place = row([index])
        difference = np.abs(logits[0, places[index]] - forward(model, params, alone)[0, place[index]]).max()
        print(f"{name}, document {index}: largest difference {difference:.1e}")
        assert difference <= 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_cache_equals_the_whole_forward_pass(name):
    model = SHAPES[name]
    decoder, params = made(model)
    batch = packed_batch(model, 2, 32, seed=3, cuts=1)
    whole = forward(model, params, batch)
    cache = init_cache(model, FLOAT32, 2, 40)
    extend = jax.jit(decoder.extend)
    parts, at = [], 0
    for size in (11, 1, 1, 19):  # a prompt, single tokens, several tokens at once
        given = (jnp.asarray(batch[key][:, at : at + size]) for key in ("tokens", "positions", "segment_ids"))
        hidden, cache = extend(*given, cache)
        parts.append(build.logits(decoder, hidden))
        at += size
    seen = batch["segment_ids"] > 0
    difference = np.abs(np.asarray(jnp.concatenate(parts, axis=1) - whole)).max(axis=-1)
    assert difference[seen].max() < 1e-5
    assert int(cache["written"]) == 32


@pytest.mark.parametrize("variant", ["nano", "tiny", pytest.param("medium", marks=pytest.mark.slow)])
def test_loss_at_initialisation_is_that_of_guessing(variant):
    config = load_config(f"configs/{variant}.py", [])
    # Full width, vocabulary and shape of a block; depth shortened so that CI can run it. Depth changes nothing here:
    # the outputs of all blocks together are drawn to one size.
    model = dataclasses.replace(config.model, layers=min(config.model.layers, 4))
    _, params = made(model)
    batch = packed_batch(model, 4, 128, seed=0)
    logits = forward(model, params, batch)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    mean = float(jnp.sum(losses * batch["loss_weights"]) / batch["loss_weights"].sum())
    assert abs(mean / math.log(model.vocab_size) - 1) < 0.02


def test_dropout_needs_a_key_and_draws_anew_for_each():
    model = tiny_model(dropout=0.5)
    _, params = made(model)
    batch = packed_batch(model, 1, 32, seed=0)
    still = forward(model, params, batch)
    assert max_difference(still, forward(model, params, batch)) == 0
    one, same, two = (forward(model, params, batch, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert max_difference(one, same) == 0
    assert max_difference(one, two) > 1e-3
    assert max_difference(one, still) > 1e-3


def test_bfloat16_is_close_and_parameters_stay_float32():
    model = tiny_model()
    _, params = made(model)
    batch = packed_batch(model, 2, 32, seed=0)
    exact = forward(model, params, batch)
    rough = forward(model, params, batch, ComputeConfig(dtype="bfloat16"))
    assert rough.dtype == jnp.float32
    assert 0 < max_difference(rough, exact) < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_parameter_without_a_sharding_rule_is_an_error():
    with pytest.raises(KeyError, match="no sharding rule"):
        spec_of(RULES, "blocks/0/attention/new/weight", 2)
