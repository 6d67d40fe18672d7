"""Whole training steps lowered and compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from smallcoder_jax.config import Config, HnetConfig, MeshConfig
from smallcoder_jax.configfile import load_config
from smallcoder_jax.mesh import CHANNELS, make_mesh, on_mesh
from smallcoder_jax.ops.recurrence import recurrence
from smallcoder_jax.stages.shared.next_token import make_loss
from smallcoder_jax.train import program

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config_of(name: str, rows: int, **compute: str) -> Config:
    """configs/NAME.py with a batch of one microbatch of `rows`, and fields of its compute section replaced."""
    config = load_config(str(CONFIGS / f"{name}.py"), [])
    train = dataclasses.replace(config.train, batch_size=rows, microbatch_size=rows)
    return dataclasses.replace(config, train=train, compute=dataclasses.replace(config.compute, **compute))


def compile_step(config: Config, mesh: MeshConfig, devices: list[Any]) -> Any:
    """The training step compiled for a mesh of `devices`, of any platform, a topology's included."""
    config = dataclasses.replace(config, mesh=mesh)
    return program.compile_step(program.make_program(config, make_loss(config), devices), config)


def compile_recurrence(
    implementation: str, shape: tuple[int, int, int], dtype: str, devices: list[Any], mesh: MeshConfig
) -> Any:
    """All states of a recurrence [B, T, E] and the gradients of its inputs, compiled for a mesh of `devices`."""
    placed = make_mesh(mesh, HnetConfig(width=shape[2]), shape[0], devices)

    def array(shape: tuple[int, ...], dtype: DTypeLike, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(placed, spec))

    def gradients(keep: Array, new: Array, start: Array, dh: Array) -> Any:
        h, pull = jax.vjp(functools.partial(recurrence, implementation=implementation), keep, new, start)
        return h, pull(dh)

    x = array(shape, dtype, CHANNELS)
    start = array((shape[0], shape[2]), jnp.float32, PartitionSpec(CHANNELS[0], CHANNELS[2]))
    return jax.jit(on_mesh(placed, gradients)).lower(x, x, start, array(shape, jnp.float32, CHANNELS)).compile()


def memory_gib(compiled: Any) -> float:
    """Memory of a device while the program runs, by the compiler's analysis, in GiB."""
    return program.memory_bytes(compiled) / 2**30
