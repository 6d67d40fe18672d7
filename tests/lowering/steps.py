"""Whole training steps lowered and compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from smallcoder_jax import optim
from smallcoder_jax.config import Config, MeshConfig
from smallcoder_jax.configfile import load_config
from smallcoder_jax.mesh import batch_sharding, make_mesh
from smallcoder_jax.stages.pretrain import make_loss
from smallcoder_jax.train.state import init_state, state_sharding
from smallcoder_jax.train.step import make_train_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config_of(name: str, rows: int, **compute: str) -> Config:
    """configs/NAME.py with a batch of one microbatch of `rows`, and fields of its compute section replaced."""
    config = load_config(str(CONFIGS / f"{name}.py"), [])
    train = dataclasses.replace(config.train, batch_size=rows, microbatch_size=rows)
    return dataclasses.replace(config, train=train, compute=dataclasses.replace(config.compute, **compute))


def compile_step(config: Config, mesh_config: MeshConfig, devices: list[Any]) -> Any:
    """The training step compiled for a mesh of `devices`, of any platform, a topology's included."""
    mesh = make_mesh(mesh_config, config.model, config.train.batch_size, devices)
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    shardings = state_sharding(mesh, state)
    step = make_train_step(
        make_loss(config),
        optimizer,
        optim.schedule(config.optimizer, config.train.steps),
        peak=config.optimizer.learning_rate,
        microbatches=1,
        guarding=config.guard,
        mesh=mesh,
        shardings=shardings,
    )
    shape = (config.train.batch_size, config.train.sequence_length)
    kinds = {"loss_weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh)) for name, kind in kinds.items()}
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )
    return step.lower(placed, batch).compile()


def memory_gib(compiled: Any) -> float:
    """Memory of a device while the program runs, by the compiler's analysis, in GiB."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    ) / 2**30
