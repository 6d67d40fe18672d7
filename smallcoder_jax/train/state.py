"""The training state that a step reads and writes: parameters, optimizer, step, RNG key and the guard's state."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from smallcoder_jax.config import Config
from smallcoder_jax.mesh import Rules, parameter_name, path_name, replicated, spec_of
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import init_head
from smallcoder_jax.models.lora import init_adapters
from smallcoder_jax.train.guard import GuardState, init_guard


class TrainState(NamedTuple):
    """The training state. `key` is the raw data of a `jax.random.key`; each step uses the key folded with `step`."""

    step: Array
    params: Any
    optimizer: Any
    key: Array
    guard: GuardState


def init_state(
    config: Config, optimizer: optax.GradientTransformation, start: build.Params | None = None
) -> TrainState:
    """A fresh state. Traceable.

    `start` holds the parts to begin with, in the layout of `config.compute.layers`. Parts that it lacks are initialised
    at random; without `start`, all are.
    """
    key = jax.random.key(config.train.seed)
    params = trained_params(config, start)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
        guard=init_guard(),
    )


def trained_params(config: Config, start: build.Params | None = None) -> build.Params:
    """The trained parts of a fresh state: the model and, in some stages, a head or a critic; or only adapters."""
    key = jax.random.key(config.train.seed)
    if config.lora.rank:
        _, shapes = build.abstract_model(config.model, dataclasses.replace(config.compute, layers="unroll"))
        adapters = init_adapters(config.lora, shapes, jax.random.fold_in(key, 3))
        return {"lora": build.to_layout(adapters, config.compute)}
    params = start or {"model": build.init_params(config.model, config.compute, jax.random.fold_in(key, 0))}
    if config.stage.kind.head and "head" not in params:
        params = {**params, "head": first_head(config)}
    if config.stage.kind.critic and "critic" not in params:
        critic = build.init_params(config.model, config.compute, jax.random.fold_in(key, 4))
        params = {**params, "critic": {"model": critic, "head": first_head(config)}}
    return params


def first_head(config: Config) -> build.Params:
    """The freshly initialised head of a model or a critic."""
    return init_head(config.model.width, jax.random.fold_in(jax.random.key(config.train.seed), 2))


def state_sharding(mesh: Mesh, state: TrainState, rules: Rules) -> TrainState:
    """Shardings for `state` (arrays or shapes). Optimizer moments are sharded like the parameter they belong to."""
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    known = {path_name(path): (parameter_name(path), leaf.shape) for path, leaf in leaves}

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        name = path_name(path)
        if leaf.ndim:
            parts = name.split("/")
            for start in range(len(parts)):
                tail = "/".join(parts[start:])
                own, shape = known.get(tail, ("", None))
                if shape == leaf.shape:
                    return jax.sharding.NamedSharding(mesh, spec_of(rules, own, leaf.ndim))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, state)
