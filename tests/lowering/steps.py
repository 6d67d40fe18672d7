"""Whole training steps lowered and compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from smallcoder_jax.config import Config, MeshConfig
from smallcoder_jax.configfile import load_config
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


def memory_gib(compiled: Any) -> float:
    """Memory of a device while the program runs, by the compiler's analysis, in GiB."""
    return program.memory_bytes(compiled) / 2**30
