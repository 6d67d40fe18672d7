"""Adapters: nothing at the start, a product that is added afterwards, the same in both layouts and on a mesh."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, LoraConfig, MeshConfig
from smallcoder_jax.mesh import make_mesh, params_sharding
from smallcoder_jax.models import build, lora
from smallcoder_jax.models.decoder.sharding import RULES
from tests.helpers import FLOAT32, max_difference, packed_batch, tiny_model

MODEL = tiny_model(vocab_size=96)
LORA = LoraConfig(rank=3, alpha=6.0)
SCANNED = dataclasses.replace(FLOAT32, layers="scan")


def base_params() -> build.Params:
    return build.init_params(MODEL, FLOAT32, jax.random.key(0))


def trained_adapters() -> build.Params:
    """As after training: b is no longer 0."""
    fresh = lora.init_adapters(LORA, base_params(), jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh)


def joined(base: build.Params, adapters: build.Params) -> build.Params:
    return {**lora.beside(LORA, base), "lora": adapters}


def test_fresh_adapters_change_nothing() -> None:
    base = base_params()
    fresh = lora.init_adapters(LORA, base, jax.random.key(1))
    kernel = fresh["blocks"][1]["mlp"]["down"]["kernel"]
    assert kernel["a"].shape == (MODEL.mlp_width, 3)
    assert kernel["b"].shape == (3, MODEL.width)
    assert float(jnp.std(kernel["a"])) == pytest.approx(MODEL.mlp_width**-0.5, rel=0.2)
    first = [fresh["blocks"][i]["attention"]["query"]["kernel"]["a"] for i in (0, 1)]
    assert max_difference(*first) > 0.1
    assert max_difference(build.model_params(joined(base, fresh)), base) == 0.0


def test_merged_kernels_are_as_adapters_beside_their_kernel() -> None:
    base, adapters = base_params(), trained_adapters()
    merged = build.model_params(joined(base, adapters))
    assert merged.keys() == base.keys()
    for i, block in base["blocks"].items():
        for part, name in [("attention", "query"), ("attention", "output"), ("mlp", "up"), ("mlp", "down")]:
            kernel, pair = block[part][name]["kernel"], adapters["blocks"][i][part][name]["kernel"]
            x = jax.random.normal(jax.random.key(5), (7, kernel.shape[0]))
            beside = x @ kernel + 2.0 * ((x @ pair["a"]) @ pair["b"])
            found = x @ merged["blocks"][i][part][name]["kernel"]
            assert max_difference(found, beside) < 1e-6 * float(jnp.max(jnp.abs(beside))) * kernel.shape[0] ** 0.5
            assert max_difference(found, x @ kernel) > 0.01
    assert max_difference(merged["embed"], base["embed"]) == 0.0
    assert max_difference(merged["blocks"][0]["mlp_norm"], base["blocks"][0]["mlp_norm"]) == 0.0


def test_both_layouts_compute_the_same() -> None:
    base, adapters = base_params(), trained_adapters()
    batch = {name: jnp.asarray(rows) for name, rows in packed_batch(MODEL, 2, 16, 0).items()}

    def hidden(compute: ComputeConfig, params: build.Params) -> jax.Array:
        graph = build.abstract_model(MODEL, compute)[0]
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        return jax.jit(lambda params: build.bind(graph, build.model_params(params))(*inputs).states_BTD)(params)

    unrolled = hidden(FLOAT32, joined(base, adapters))
    scanned = hidden(SCANNED, joined(build.to_scanned(base), build.to_scanned(adapters)))
    assert max_difference(unrolled, scanned) < 1e-5
    assert max_difference(unrolled, hidden(FLOAT32, {"model": base})) > 0.01


def test_the_pattern_chooses_kernels() -> None:
    chosen = dataclasses.replace(LORA, pattern=r"attention/(query|value)/kernel")
    block = lora.init_adapters(chosen, base_params(), jax.random.key(1))["blocks"][0]
    assert block.keys() == {"attention"}
    assert block["attention"].keys() == {"query", "value"}


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [("attention/nothing", "matches no kernel of a block; there are attention/key/kernel"), ("(", "no regular")],
)
def test_a_pattern_without_kernels_is_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        lora.init_adapters(dataclasses.replace(LORA, pattern=pattern), base_params(), jax.random.key(1))


@pytest.mark.parametrize("compute", [FLOAT32, SCANNED], ids=["unroll", "scan"])
def test_adapters_are_split_so_that_merging_sends_nothing(compute: ComputeConfig) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), MODEL, 2, jax.devices()[:4])
    params = joined(build.to_layout(base_params(), compute), build.to_layout(trained_adapters(), compute))
    shardings = params_sharding(mesh, params, RULES)
    merge = jax.jit(build.model_params, in_shardings=(shardings,), out_shardings=shardings["model"])
    text = merge.lower(params).compile().as_text()
    assert text
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
    placed = jax.device_put(params, shardings)
    kernel = placed["lora"]["blocks"] if compute is SCANNED else placed["lora"]["blocks"][0]
    pair = kernel["mlp"]["down"]["kernel"]
    assert pair["a"].addressable_shards[0].data.shape[-2:] == (MODEL.mlp_width // 2, 3)
    assert pair["b"].addressable_shards[0].data.shape[-2:] == (3, MODEL.width // 2)
    assert max_difference(merge(placed), build.model_params(params)) < 1e-6
