"""Config to model: a static graph, and parameters as a plain nested dict of arrays.

Parameters exist in two layouts: unrolled (`blocks/0/...`, what files and exports use) and scanned (`blocks/...` with a
leading axis of layers). The same key draws the same numbers in both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from smallcoder_jax.config import ComputeConfig, ModelConfig, parameter_count
from smallcoder_jax.models import lora
from smallcoder_jax.models.decoder import Decoder

Params = dict[Any, Any]
DECODER = ("embed", "position_embed", "blocks", "final_norm", "unembed")  # the decoder's own; others may stand beside


@functools.cache
def abstract_model(model: ModelConfig, compute: ComputeConfig) -> tuple[Any, Params]:
    """The model's graph and the shapes of its parameters, without touching a device."""
    decoder = nnx.eval_shape(lambda: Decoder(model, compute, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(decoder)
    return graph, nnx.to_pure_dict(state)


def init_params(model: ModelConfig, compute: ComputeConfig, key: Array) -> Params:
    """Fresh parameters in the layout of `compute.layers`; traceable, so that `jit` can place them on a mesh."""
    unrolled = dataclasses.replace(compute, layers="unroll")
    params = nnx.to_pure_dict(nnx.state(Decoder(model, unrolled, rngs=nnx.Rngs(params=key))))
    return to_layout(params, compute)


def bind(graph: Any, params: Params) -> Decoder:
    """The module that `graph` describes over the decoder's part of `params`; cheap, made anew inside every trace."""
    return nnx.merge(graph, decoder_params(params))


def decoder_params(params: Params) -> Params:
    """The decoder's own parameters, adapters merged, without what stands beside them (a head, a critic, a teacher)."""
    own = {name: params[name] for name in DECODER if name in params}
    return lora.merge(own, params["lora"], params["lora_scale"]) if "lora" in params else own


def to_layout(params: Params, compute: ComputeConfig) -> Params:
    """Unrolled parameters in the layout of `compute.layers`."""
    return to_scanned(params) if compute.layers == "scan" else params


def to_scanned(params: Params) -> Params:
    """Stacks the blocks: `blocks/{i}/...` to `blocks/...` with a leading axis of layers; also those of a decoder that
    stands beside (a critic)."""
    blocks = params["blocks"]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *[blocks[i] for i in range(len(blocks))])
    beside = {name: to_scanned(part) for name, part in params.items() if isinstance(part, dict) and "blocks" in part}
    return {**params, **beside, "blocks": stacked}


def to_unrolled(params: Params) -> Params:
    """The inverse of `to_scanned`; parameters that are unrolled already are returned as they are."""
    stacked = params["blocks"]
    if all(isinstance(key, int) for key in stacked):
        return params
    layers = jax.tree.leaves(stacked)[0].shape[0]
    return {**params, "blocks": {i: jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(layers)}}


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of one training step per token: 6 per matrix parameter, and causal attention once
    (a query of one long document sees half of the row on average), as in the PaLM paper's appendix B.
    """
    matrices = parameter_count(model)
    if model.embeddings == "untied":
        matrices -= model.vocab_size * model.width
    if model.positions == "learned":
        matrices -= model.context * model.width
    attention = 12 * model.layers * model.heads * model.head_size * sequence_length / 2
    return 6.0 * matrices + attention
