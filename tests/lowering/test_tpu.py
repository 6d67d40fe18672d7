"""Whole training steps compiled for TPU slices with TPU's own compiler, on a machine without a TPU.

    make test-lowering

needs libtpu, which `make` puts into an environment of its own. What is printed (pytest -s), memory per chip, VMEM of
each kernel and cycles, is what the compiler says, not what was measured.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from smallcoder_jax.config import Config, MeshConfig
from smallcoder_jax.kernels import recurrence_tpu
from smallcoder_jax.kernels.flash_tpu import VMEM_MIB
from smallcoder_jax.ops import attention
from smallcoder_jax.preflight.target import target_of
from tests.helpers import CAPTURES
from tests.lowering import splash
from tests.lowering.cycles import kernel_vmem, outside_kernels
from tests.lowering.preflights import CONFIGS, check, check_preset, preflight
from tests.lowering.steps import compile_recurrence, compile_step, config_of, memory_gib

pytestmark = [pytest.mark.lowering, pytest.mark.usefixtures("standard_promotion")]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SLICES = [("v5e:16x16", 256), ("v5p:4x4x4", 64), ("v6e:8x8", 64)]
HBM_GIB = {"v5e": 16, "v5p": 95, "v6e": 32}
ONE, SLICE = MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2)
# The longest rows on one chip and on a slice are enough to see that it compiles; the others take as long again twice.
VARIANTS = ["medium_lc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("medium", "tiny"))]


@functools.cache
def devices_of(chip: str) -> list[Any]:
    return target_of(CHIPS[chip]).devices


@functools.cache
def step(chip: str, config: Config, mesh: MeshConfig) -> tuple[str, float]:
    """Text of the compiled step and GiB per chip."""
    compiled = compile_step(config, mesh, devices_of(chip)[: 1 if mesh is ONE else 4])
    return compiled.as_text(), memory_gib(compiled)


def check_step(chip: str, config: Config, mesh: MeshConfig) -> None:
    text, gib = step(chip, config, mesh)
    vmem = kernel_vmem(text)
    name = f"{chip} x {1 if mesh is ONE else 4}, {config.name}"
    print(f"{name}: {gib:.1f} GiB per chip; {len(vmem)} kernels, VMEM in MiB:", end=" ")
    print({kernel: round(mib, 1) for kernel, mib in list(vmem.items())[:3]})
    layers = 1 if config.compute.layers == "scan" else config.model.layers
    assert len(vmem) == layers * (2 if config.compute.remat == "none" else 3)
    assert gib < HBM_GIB[chip]
    assert max(vmem.values()) < VMEM_MIB[devices_of(chip)[0].device_kind]
    # A device's kernel sees its own rows and heads alone.
    rows, heads = 1, config.model.kv_heads // mesh.tensor
    group, length = config.model.heads // config.model.kv_heads, config.train.sequence_length
    assert f"bf16[{rows},{heads},{group},{length},{config.model.head_size}]" in text


def in_a_loop(variant: str, rows: int) -> Config:
    """Layers in a loop, which compiles in seconds whatever their number."""
    return config_of(variant, rows, attention="pallas_tpu", layers="scan")


@pytest.mark.parametrize("mesh", [ONE, SLICE], ids=["one chip", "four chips"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chip", list(CHIPS))
def test_the_step_with_the_kernel_compiles(chip: str, variant: str, mesh: MeshConfig) -> None:
    check_step(chip, in_a_loop(variant, 1 if mesh is ONE else 2), mesh)


def test_the_step_with_unrolled_layers_compiles() -> None:
    check_step("v5e", config_of("tiny", 1, attention="pallas_tpu"), ONE)


def test_the_step_with_rows_split_along_their_length_compiles() -> None:
    check_step("v5e", in_a_loop("tiny", 2), MeshConfig(data=1, fsdp=2, context=2))


@CAPTURES  # splash's masks
@pytest.mark.parametrize("chip", list(CHIPS))
def test_less_is_left_to_xla_than_with_its_rope_and_splash_attention(
    chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotation, its gradient and what is laid out anew for a kernel cost cycles outside it."""
    config = in_a_loop("medium_lc", 1)
    text, _ = step(chip, config, ONE)
    monkeypatch.setattr(attention, "_flash", splash.attend)
    theirs = compile_step(config, ONE, devices_of(chip)[:1]).as_text()
    print(f"{chip}, {config.name}: XLA's estimated cycles outside of the attention kernels", end=" ")
    cycles, their_cycles = (outside_kernels(each, config.model.layers) for each in (text, theirs))
    print(f"{cycles / 1e6:.1f}M, with RoPE and splash attention {their_cycles / 1e6:.1f}M", end="; ")
    print("VMEM of splash's in MiB:", {kernel: round(mib, 1) for kernel, mib in kernel_vmem(theirs).items()})
    assert any(kernel.startswith("splash") for kernel in kernel_vmem(theirs))
    assert cycles < their_cycles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", list(CHIPS))
def test_the_recurrence_moves_each_byte_once_and_spills_nothing(chip: str, dtype: str) -> None:
    rows, length, width = 16, 8192, 1024  # too large for XLA to keep an array in VMEM
    compiled = compile_recurrence("pallas_tpu", (rows, length, width), dtype, devices_of(chip)[:1], MeshConfig())
    own = jnp.dtype(dtype).itemsize  # bytes of `keep`, `new` and their gradients, each
    must = rows * length * width * ((2 * own + 4) + (own + 2 * 4 + 2 * own))
    moved = compiled.cost_analysis()["bytes accessed"]  # of XLA and, as they say themselves, of the kernels
    vmem = sorted(kernel_vmem(compiled.as_text()).values())
    print(f"{chip}, {dtype}: {moved / must:.4f} of the bytes that it must move; VMEM in MiB: {vmem}")
    assert must <= moved <= 1.02 * must
    block = recurrence_tpu.POSITIONS * recurrence_tpu.CHANNELS / 2**20
    for found, itemsizes in zip(vmem, (2 * own + 4, 3 * own + 2 * 4), strict=True):
        assert found <= 2 * block * itemsizes + 0.1  # two blocks of each array, and what is small


def test_each_chip_works_on_its_rows_and_channels() -> None:
    compiled = compile_recurrence("pallas_tpu", (16, 8192, 2048), "float32", devices_of("v5e"), SLICE)
    text = compiled.as_text()
    assert len(kernel_vmem(text)) == 2
    assert set(re.findall(r"f32\[(\d+,8192,\d+)\]", text)) == {"8,8192,1024"}  # nothing was gathered


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize(
    ("slice_of", "devices"),
    [("v5e:4x4", 16), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLICES)],
)
def test_preflight(slice_of: str, devices: int, variant: str, tmp_path: Path) -> None:
    check(preflight(variant, slice_of, tmp_path), devices)


@pytest.mark.slow
def test_preflight_of_slices_counts_what_goes_over_the_slower_network(tmp_path: Path) -> None:
    report = preflight("tiny", "2xv5e:4x4", tmp_path)
    assert (report["devices"], report["mesh"]["data"]) == (32, 32)
    # Each of the 16 chips of a slice exchanges its part of the gradients, at the least.
    between = sum(each["between_hosts"] for each in report["traffic"]["collectives"])
    assert 4 * report["parameters"] / 16 <= between < 4 * report["parameters"]


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize(
    "name", ["v5e-16", *(pytest.param(each, marks=pytest.mark.slow) for each in ("v5p-16", "v6e-16"))]
)
def test_a_preset_fits(name: str, variant: str, tmp_path: Path) -> None:
    check_preset(name, variant, tmp_path)
