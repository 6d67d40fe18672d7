"""Devices to compile for, present or not, and the known figures of their kind."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np

from smallcoder_jax.base.errors import UserError

GPU_SHARE = 0.75  # of a GPU's memory, which JAX reserves unless XLA_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip. `memory` is in bytes and its `bandwidth` in bytes/s. `link` is the bytes/s that the chip can
    send to the others of its slice or node, and `network` those to other slices or nodes. `source` says where the
    figures come from.
    """

    memory: float
    bandwidth: float
    link: float
    network: float
    source: str


_TPU = (
    "docs.cloud.google.com/tpu/docs (all links at once, one direction; between slices a chip's share of the pod's data "
    "center network); memory as the compiler counts it"
)
# By the prefix of JAX's device kind; peak rates are in train.flops.
CHIPS = {
    "TPU v5 lite": Chip(15.75 * 2**30, 819e9, 200e9, 3.125e9, _TPU),
    "TPU v5": Chip(95.74 * 2**30, 2765e9, 600e9, 6.25e9, _TPU),
    "TPU v6 lite": Chip(31.25 * 2**30, 1600e9, 400e9, 12.5e9, _TPU),
    "NVIDIA H200": Chip(
        143771 * 2**20,
        4.8e12,
        450e9,
        50e9,
        "NVIDIA's data sheet (NVLink, one direction), memory by nvidia-smi; between nodes 400 Gbit/s per GPU, assumed",
    ),
}
# Slices as they are offered. Those of sizes in between consist of the same blocks.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES, "h200": ("1x1", "1x2", "1x4", "1x8", "2x8", "4x8", "8x8")}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind, and the bytes of memory that a program can use on each."""

    name: str
    devices: list[Any]
    memory: float
    memory_source: str

    @property
    def chip(self) -> Chip | None:
        return chip_of(self.devices[0].device_kind)


def chip_of(kind: str) -> Chip | None:
    """The figures of a device kind, as JAX names it; None when they are not known."""
    return next((chip for start, chip in CHIPS.items() if kind.startswith(start)), None)


def target_of(name: str) -> Target:
    """The target of a topology: `v5e:16x16` (chips), `2xv5e:16x16` (slices of chips), `h200:2x8` (nodes x GPUs) or
    `cpu` (this machine).

    A process that has not used JAX yet will use only its CPU afterwards, and leaves other devices alone. Raises
    UserError when the name is not known, or its compiler is not installed.
    """
    family, _, shape = name.partition(":")
    slices = 1
    if several := re.fullmatch(r"([1-9]\d*)x(v\w+)", family):
        slices, family = int(several[1]), several[2]
    if name != "cpu" and shape not in SHAPES.get(family, ()):
        raise UserError(f"--topology={name}: {_nearest(family, shape)}")
    jax.config.update("jax_platforms", "cpu")
    if name == "cpu":
        return target_here(jax.devices())
    devices = list(np.asarray(_gpus(shape) if family == "h200" else _chips(name, f"{family}:{shape}", slices)).flat)
    target = Target(name, devices, 0.0, "")
    chip = target.chip
    assert chip is not None
    if family != "h200":
        return dataclasses.replace(target, memory=chip.memory, memory_source="what the compiler leaves to a program")
    share = float(os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0)
    source = f"{share or GPU_SHARE:.0%} of {chip.memory / 2**30:.0f} GiB, which JAX reserves"
    return dataclasses.replace(target, memory=chip.memory * (share or GPU_SHARE), memory_source=source)


def target_here(devices: list[Any]) -> Target:
    """The target of devices that are present. Raises UserError when they do not report their memory."""
    device = devices[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
        return Target("cpu", devices, memory, "this machine's memory, divided over its devices")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise UserError(f"{device.device_kind} does not say how much memory it has")
    return Target("this machine", devices, float(limit), "what JAX has reserved")


def _chips(name: str, slice_name: str, slices: int) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs TPU's compiler, not a TPU: pip install -e '.[tpu]' (package libtpu)")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server where there is no TPU
    options: dict[str, Any] = {}
    if set(slice_name.partition(":")[2]) == {"1", "x"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" not in str(error):
            raise
        raise UserError(
            f"--topology={name}: another process on this machine uses libtpu; wait for its end, or, where there is no "
            "TPU, set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        ) from error


def _gpus(shape: str) -> Any:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            f"--topology=h200:{shape} needs JAX's compiler for GPUs, not a GPU: pip install -e '.[cuda]', in an "
            "environment without libtpu"
        )
    from jax.experimental import topologies

    text = importlib.resources.files("smallcoder_jax.preflight").joinpath("h200.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x{shape}").devices


def _nearest(family: str, shape: str) -> str:
    """Advice for a topology that is not known: the nearest name, and the known ones."""
    if family not in SHAPES:
        word = re.split(r"[:-]", family)[0].lower()
        close = difflib.get_close_matches(word, [*SHAPES, "cpu"], n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return f"{hint}known are cpu and {', '.join(f'{name}:{shapes[3]}' for name, shapes in SHAPES.items())}"
    known = SHAPES[family]
    numbers = [int(number) for number in re.findall(r"\d+", shape)] or [1]
    near = min(known, key=lambda each: (abs(np.log(_size(each) / max(np.prod(numbers), 1))), each))
    return f"did you mean '{family}:{near}'? known are {', '.join(f'{family}:{each}' for each in known)}"


def _size(shape: str) -> int:
    return int(np.prod([int(number) for number in shape.split("x")]))
