"""Whole training steps compiled for TPU slices with TPU's own compiler, on a machine without a TPU.

    make test-lowering

needs libtpu, which `make` puts into an environment of its own. The printed table (pytest -s) has memory per chip.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from smallcoder_jax import optim
from smallcoder_jax.config import Config, MeshConfig
from smallcoder_jax.configfile import load_config
from smallcoder_jax.mesh import batch_sharding, make_mesh
from smallcoder_jax.stages.pretrain import make_loss
from smallcoder_jax.train.state import init_state, state_sharding
from smallcoder_jax.train.step import make_train_step

pytestmark = [pytest.mark.lowering, pytest.mark.usefixtures("standard_promotion")]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HBM_GIB = {"v5e": 16, "v5p": 95, "v6e": 32}
ONE, SLICE = MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2)


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")


def config_of(name: str, rows: int, **compute: str) -> Config:
    config = load_config(str(CONFIGS / f"{name}.py"), [])
    train = dataclasses.replace(config.train, batch_size=rows, microbatch_size=rows)
    return dataclasses.replace(config, train=train, compute=dataclasses.replace(config.compute, **compute))


def compile_step(config: Config, mesh_config: MeshConfig, devices: list[Any]) -> Any:
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
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    ) / 2**30


def check_step(chip: str, config: Config, mesh: MeshConfig) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    devices = list(np.asarray(topology.devices).flat)[: 1 if mesh is ONE else 4]
    compiled = compile_step(config, mesh, devices)
    text = compiled.as_text()
    kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
    layers = 1 if config.compute.layers == "scan" else config.model.layers
    print(f"{chip} x {len(devices)}, {config.name}: {memory_gib(compiled):.1f} GiB per chip, {kernels} kernels")
    assert kernels == layers * (2 if config.compute.remat == "none" else 3)
    assert memory_gib(compiled) < HBM_GIB[chip]
    # A device's kernel sees its own rows and heads alone.
    rows, heads = (1, config.model.kv_heads) if mesh is ONE else (1, config.model.kv_heads // 2)
    group, length = config.model.heads // config.model.kv_heads, config.train.sequence_length
    assert f"bf16[{rows},{heads},{group},{length},{config.model.head_size}]" in text


@pytest.mark.parametrize("mesh", [ONE, SLICE], ids=["one chip", "four chips"])
@pytest.mark.parametrize("variant", ["tiny", "medium", "medium_lc"])
@pytest.mark.parametrize("chip", list(CHIPS))
def test_the_step_with_the_kernel_compiles(chip: str, variant: str, mesh: MeshConfig) -> None:
    """Layers in a loop, which compiles in seconds whatever their number."""
    rows = 1 if mesh is ONE else 2
    check_step(chip, config_of(variant, rows, attention="pallas_tpu", layers="scan"), mesh)


def test_the_step_with_unrolled_layers_compiles() -> None:
    check_step("v5e", config_of("tiny", 1, attention="pallas_tpu"), ONE)
