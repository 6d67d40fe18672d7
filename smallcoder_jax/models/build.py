"""Builds a model from a config: a static graph, and parameters as a plain nested dict of arrays.

The parameters of a model have two layouts: unrolled (`blocks/0/...`, used in files and exports) and scanned
(`blocks/...` with a leading axis of layers). The same key initialises both with the same numbers.

The parameters that a loss sees are divided into parts: `"model"` and, in some stages, `"head"`, `"critic"` (a model and
a head, again as parts), `"lora"` with `"lora_scale"`, and `"teacher"` (the parameters of a model, not divided).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.models import lora
from smallcoder_jax.models.families import family_of
from smallcoder_jax.models.family import Module
from smallcoder_jax.ops import cross_entropy

Params = dict[Any, Any]


@functools.cache
def abstract_model(model: ModelConfig, compute: ComputeConfig) -> tuple[Any, Params]:
    """The model's graph and the shapes of its parameters, without touching a device."""
    module = nnx.eval_shape(lambda: family_of(model).module(model, compute, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def init_params(model: ModelConfig, compute: ComputeConfig, key: Array) -> Params:
    """Fresh parameters in the layout of `compute.layers`. Traceable, so that `jit` can place them on a mesh."""
    unrolled = dataclasses.replace(compute, layers="unroll")
    module = family_of(model).module(model, unrolled, rngs=nnx.Rngs(params=key))
    return to_layout(nnx.to_pure_dict(nnx.state(module)), compute)


def bind(graph: Any, params: Params) -> Module:
    """The module that `graph` describes, with a model's own parameters. Cheap: every trace makes a new one."""
    return nnx.merge(graph, params)


def logits(model: Module, hidden_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """The logits of the next token, float32."""
    return cross_entropy.logits(hidden_BTD, model.unembedding()).astype(jnp.float32)


def model_params(parts: Params) -> Params:
    """The model's own parameters, taken from `parts`; adapters are merged into them."""
    own = parts["model"]
    return lora.merge(own, parts["lora"], parts["lora_scale"]) if "lora" in parts else own


def to_layout(params: Params, compute: ComputeConfig) -> Params:
    """Unrolled parameters in the layout of `compute.layers`."""
    return to_scanned(params) if compute.layers == "scan" else params


def to_scanned(params: Params) -> Params:
    """Stacks the blocks of every model in `params`: `blocks/{i}/...` to `blocks/...` with a leading axis of layers.
    Blocks of different structures are left as they are."""

    def stacked(name: Any, below: Any) -> Any:
        if name == "blocks" and all(isinstance(key, int) for key in below) and _alike(below):
            return jax.tree.map(lambda *layers: jnp.stack(layers), *[below[i] for i in range(len(below))])
        return to_scanned(below)

    return {name: stacked(name, below) if isinstance(below, dict) else below for name, below in params.items()}


def _alike(blocks: Params) -> bool:
    shapes = [jax.tree.map(jnp.shape, block) for block in blocks.values()]
    return all(shape == shapes[0] for shape in shapes)


def to_unrolled(params: Params) -> Params:
    """The inverse of `to_scanned`. Parameters that are already unrolled are returned as they are."""

    def unrolled(name: Any, below: Any) -> Any:
        if name == "blocks" and not all(isinstance(key, int) for key in below):
            layers = jax.tree.leaves(below)[0].shape[0]
            return {i: jax.tree.map(lambda x, i=i: x[i], below) for i in range(layers)}
        return to_unrolled(below)

    return {name: unrolled(name, below) if isinstance(below, dict) else below for name, below in params.items()}
