"""Whole training steps compiled for H200s, with the compiler's own account of the kernels, on a machine without a GPU.

    make test-lowering

needs jax's CUDA packages, which `make` puts into an environment of their own. What is printed (pytest -s) is what the
compilers say, not what was measured. Each step is compiled in a process of its own, because Mosaic GPU has ptxas print
registers and spills to the standard output.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from smallcoder_jax.config import MeshConfig
from smallcoder_jax.kernels import recurrence_hopper
from smallcoder_jax.kernels.flash_hopper import flash_attention, shared_memory_bytes
from smallcoder_jax.kernels.tiles import HopperTiles
from smallcoder_jax.ops.attention import attention
from smallcoder_jax.preflight.target import target_of
from tests.lowering.preflights import CONFIGS, check, check_preset, preflight
from tests.lowering.steps import compile_recurrence, compile_step, config_of, memory_gib

pytestmark = pytest.mark.lowering

HBM_GIB = 141
MESHES = {1: MeshConfig(data=1), 4: MeshConfig(data=1, fsdp=2, tensor=2), 8: MeshConfig(data=2, fsdp=2, tensor=2)}
KERNELS = ("attention_forward", "attention_dq", "attention_dkv")
RECURRENCE = ("recurrence_forward", "recurrence_backward")
# For the process that compiles: what ptxas says, no search for devices, and optax's mixed types and ranks.
ENVIRONMENT = {
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
}


def devices_of(count: int) -> list[Any]:
    return target_of(f"h200:1x{count}").devices


def compile_one(variant: str, count: int) -> None:
    """Run in the process that compiles: prints memory per GPU in GiB last."""
    config = config_of(variant, MESHES[count].data * MESHES[count].fsdp, attention="pallas_gpu", layers="scan")
    print(f"GiB {memory_gib(compile_step(config, MESHES[count], devices_of(count))):.2f}")


def compile_variants(size: int) -> None:
    """Run in the process that compiles: output and gradients for groups of all kinds, with rotation and without."""
    sharding = SingleDeviceSharding(devices_of(1)[0])

    def array(*shape: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for group, rotated in itertools.product((1, 2, 3, 4, 8), (True, False)):
        q, kv, ids = array(2, 1000, 2 * group, size), array(2, 1000, 2, size), array(2, 1000, dtype=jnp.int32)
        table = array(2, 1000, size // 2, dtype=jnp.float32)

        def gradients(q: Array, k: Array, v: Array, ids: Array, rotation: Any, do: Array) -> Any:
            attend = functools.partial(
                flash_attention, segment_ids_BT=ids, rotation=rotation, window=700, tiles=HopperTiles()
            )
            return jax.vjp(attend, q, k, v)[1](do)

        jax.jit(gradients).lower(q, kv, kv, ids, (table, table) if rotated else None, q).compile()


def compile_recurrences(dtype: str, count: int) -> None:
    """Run in the process that compiles: prints PTX, and what the program for a GPU consists of and works on."""
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    text = compile_recurrence("pallas_gpu", (8, 2048, 1024), dtype, devices_of(count), MESHES[count]).as_text()
    entry = text.partition("\nENTRY ")[2]
    print("PROGRAM", *re.findall(r"^ .* = .*? ([a-z-]+)\(", entry, re.MULTILINE))
    print("SHAPES", *set(re.findall(r"(?:f32|bf16)\[(\d+,\d+,\d+)\]", entry)))


def ptxas_reports(call: str, kernels: tuple[str, ...] = KERNELS) -> tuple[str, list[tuple[str, int, int, int]]]:
    """What a call of this module prints in a process of its own; and of each kernel that was compiled there, its name,
    bytes of spill stores and loads, and registers.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.lowering import test_h200; test_h200.{call}"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout + done.stderr
    found = re.findall(
        r"entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == set(kernels), said[-4000:]
    return said, [(name, int(stores), int(loads), int(registers)) for name, stores, loads, registers in found]


@pytest.mark.parametrize("count", list(MESHES))
@pytest.mark.parametrize(
    "variant", ["medium_lc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("medium", "tiny"))]
)
def test_the_step_with_the_kernels_compiles_without_spills(variant: str, count: int) -> None:
    said, reports = ptxas_reports(f"compile_one({variant!r}, {count})")
    memory = re.search(r"GiB ([\d.]+)", said)
    assert memory is not None
    shared = shared_memory_bytes(config_of(variant, 1).model.head_size, HopperTiles())
    print(f"H200 x {count}, {variant}: {memory[1]} GiB per GPU", end="; ")
    print({name: f"{shared[name] >> 10} KiB shared, {used} registers" for name, _, _, used in sorted(set(reports))})
    assert [report for report in reports if report[1] or report[2]] == []
    assert float(memory[1]) < HBM_GIB


@pytest.mark.parametrize("size", [64, 128])
def test_no_group_of_heads_makes_a_kernel_spill(size: int) -> None:
    _, reports = ptxas_reports(f"compile_variants({size})")
    assert [report for report in reports if report[1] or report[2]] == []
    assert len(reports) >= 2 * len(KERNELS)


@pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("bfloat16", 4)])
def test_the_recurrence_moves_each_byte_once_and_spills_nothing(dtype: str, count: int) -> None:
    said, reports = ptxas_reports(f"compile_recurrences({dtype!r}, {count})", RECURRENCE)
    print(f"H200 x {count}, {dtype}:", {name: f"{used} registers" for name, _, _, used in reports})
    assert [report for report in reports if report[1] or report[2]] == []
    # Nothing but the two kernels works on an array.
    program = re.search(r"^PROGRAM (.*)$", said, re.MULTILINE)
    assert program is not None
    assert set(program[1].split()) == {"parameter", "custom-call", "get-tuple-element", "tuple"}
    assert program[1].split().count("custom-call") == 2
    # A GPU has its own rows and channels alone.
    assert f"\nSHAPES {'8,2048,1024' if count == 1 else '4,2048,512'}\n" in said
    # Within the kernels copies are TMA's: those that fill the ring, and one of each array for each step of the walk.
    for name, stages, loads, stores in (
        ("forward", recurrence_hopper.STAGES, 2, 1),
        ("backward", recurrence_hopper.BACKWARD_STAGES, 3 + 2, 2),  # and the position before, from `h` or `start`
    ):
        found = re.search(rf"\.entry recurrence_{name}_mosaic.*?func_end", said, re.DOTALL)
        assert found is not None
        assert not re.search(r"\b(ld|st)\.global", found[0])
        into = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", found[0]))
        back = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", found[0]))
        assert loads <= into <= loads * (stages + 1) + 1  # and `start`
        assert back == stores


def test_cudnn_is_called_for_rows_of_one_document() -> None:
    sharding = SingleDeviceSharding(devices_of(1)[0])
    q, kv = (jax.ShapeDtypeStruct((2, 1024, n, 128), jnp.bfloat16, sharding=sharding) for n in (8, 2))
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=sharding)

    def attend(q: Array, k: Array, v: Array, ids: Array) -> Array:
        return attention(
            q, k, v, q_positions_BT=ids, kv_positions_BS=ids, q_segment_ids_BT=ids, kv_segment_ids_BS=ids,
            rope_theta=1e4, implementation="cudnn", packed=False,
        )  # fmt: skip

    assert "__cudnn$fmha" in jax.jit(attend).lower(q, kv, kv, ids).compile().as_text()


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize(
    ("nodes", "devices"),
    [("h200:1x8", 8), *(pytest.param(*each, marks=pytest.mark.slow) for each in [("h200:1x1", 1), ("h200:2x8", 16)])],
)
def test_preflight(nodes: str, devices: int, variant: str, tmp_path: Path) -> None:
    check(preflight(variant, nodes, tmp_path), devices)


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("name", ["h200", pytest.param("h200x8", marks=pytest.mark.slow)])
def test_a_preset_fits(name: str, variant: str, tmp_path: Path) -> None:
    check_preset(name, variant, tmp_path)
