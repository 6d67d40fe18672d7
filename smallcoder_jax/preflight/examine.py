"""The report of a config on devices that need not be present. Its step is compiled but never run."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config
from smallcoder_jax.mesh import mesh_sizes, row_devices, slice_of
from smallcoder_jax.models.families import family_of
from smallcoder_jax.preflight import estimate
from smallcoder_jax.preflight.collectives import Traffic, traffic
from smallcoder_jax.preflight.search import Largest, Trial, largest_rows
from smallcoder_jax.preflight.target import Target
from smallcoder_jax.train.flops import peak_flops
from smallcoder_jax.train.program import Program, compile_step, make_program, memory_bytes
from smallcoder_jax.train.step import LossFn


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of memory of one device. `activations` are all temporaries except one tree of gradients. A value is None
    when the compiler refused the step and did not report it.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float | None
    peak: float | None
    available: float
    available_source: str
    fits: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a preflight. `changes` and `remedy` are flags: what was changed so that rows divide over the mesh,
    and what would make the step fit (None: it fits, or nothing that was tried does).
    """

    name: str
    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    microbatch_size: int
    sequence_length: int
    changes: tuple[str, ...]
    attention: str
    recurrence: str  # empty: there are no recurrences
    parameters: int
    memory: Memory
    largest: Largest
    remedy: tuple[str, ...] | None
    flops_per_token: float
    executed_flops_per_token: float
    traffic: Traffic | None
    roofline: estimate.Roofline | None
    chip_source: str | None
    budget: estimate.Budget | None
    compile_seconds: float


def divided(config: Config, devices: int) -> tuple[Config, tuple[str, ...]]:
    """The config with batch sizes rounded up so that they divide over a mesh of `devices`, and the flags for that."""
    parts = row_devices(mesh_sizes(config.mesh, devices))
    rows = _up(config.train.microbatch_rows, parts)
    train = dataclasses.replace(config.train, microbatch_size=rows, batch_size=_up(config.train.batch_size, rows))
    evaluation = dataclasses.replace(config.eval, batch_size=_up(config.eval.batch_size, parts))
    if rows == config.train.microbatch_rows:
        train = dataclasses.replace(train, microbatch_size=config.train.microbatch_size)
    pairs = (("train.batch_size", config.train.batch_size, train.batch_size),
             ("train.microbatch_size", config.train.microbatch_size, train.microbatch_size),
             ("eval.batch_size", config.eval.batch_size, evaluation.batch_size))  # fmt: skip
    changes = tuple(f"--config.{name}={now}" for name, before, now in pairs if now != before)
    return dataclasses.replace(config, train=train, eval=evaluation), changes


def examine(
    config: Config, loss_fn: LossFn, target: Target, *, tokens: float | None = None, price: float | None = None
) -> Report:
    """Compiles the step of `config` for the target, and variants of it to find the largest microbatch that fits.

    `tokens` is a budget of tokens, by default what the config trains on. `price` is the price of one device-hour.
    Raises UserError when the config does not fit the mesh.
    """
    tokens = tokens or float(config.train.steps * config.train.batch_size * config.train.sequence_length)
    count = len(target.devices)
    config, changes = divided(config, count)
    program = make_program(config, loss_fn, target.devices)
    first, compiled = _try(config, program, target)
    parts = row_devices(program.mesh.shape)
    trees = (program.state.params, program.state.optimizer, program.frozen)
    parameters, optimizer, frozen = (_bytes_per_device(tree) for tree in trees)
    largest = largest_rows(
        first,
        lambda rows: _attempt(_with_rows(config, rows * parts), loss_fn, target),
        target.memory,
        fixed=2 * parameters + optimizer + frozen,  # and gradients
    )
    executed = estimate.executed_per_token(config, program.cross_entropy)
    sent, roofline = (None, None) if compiled is None else _least(config, program, target, compiled, executed)
    return Report(
        name=config.name,
        topology=target.name,
        device_kind=target.devices[0].device_kind,
        devices=count,
        mesh=dict(program.mesh.shape),
        batch_size=config.train.batch_size,
        microbatch_size=config.train.microbatch_rows,
        sequence_length=config.train.sequence_length,
        changes=changes,
        attention=f"{program.attention.implementation} ({program.attention.reason})",
        recurrence="; ".join(map(str, program.recurrence)),
        parameters=config.model.parameter_count(),
        memory=Memory(
            parameters + frozen,
            optimizer,
            parameters,
            None if compiled is None else max(compiled.memory_analysis().temp_size_in_bytes - parameters, 0.0),
            first.peak,
            target.memory,
            target.memory_source,
            first.fits,
        ),
        largest=largest,
        remedy=None if first.fits else _remedy(config, loss_fn, target, largest, parts),
        flops_per_token=family_of(config.model).flops_per_token(config.model, config.train.sequence_length),
        executed_flops_per_token=executed,
        traffic=sent,
        roofline=roofline,
        chip_source=target.chip.source if roofline is not None and target.chip is not None else None,
        budget=None if roofline is None else estimate.budget(config, roofline.step, tokens, count, price),
        compile_seconds=first.seconds,
    )


def _least(
    config: Config, program: Program, target: Target, compiled: Any, executed: float
) -> tuple[Traffic, estimate.Roofline | None]:
    """The bytes that a step sends, and the least time that it takes if the chip's figures are known."""
    sent = traffic(compiled.as_text(), [_host(device) for device in program.mesh.devices.flat])
    peak = peak_flops(target.devices[0].device_kind)
    if target.chip is None or peak is None:
        return sent, None
    moved = _moved(compiled, config)
    return sent, estimate.roofline(config, executed, moved, sent, target.chip, peak, len(target.devices))


def _host(device: Any) -> Any:
    """The group of devices that are connected by a fast network: a TPU slice, whatever its hosts, or else a host."""
    return device.process_index if device.platform == "gpu" else slice_of(device)


def _up(rows: int, parts: int) -> int:
    return -(-rows // parts) * parts


def _with_rows(config: Config, rows: int) -> Config:
    """The config with microbatches of `rows` rows and the same number of microbatches."""
    train = config.train
    batch = train.batch_size // train.microbatch_rows * rows
    return dataclasses.replace(config, train=dataclasses.replace(train, batch_size=batch, microbatch_size=rows))


def _attempt(config: Config, loss_fn: LossFn, target: Target) -> Trial:
    return _try(config, make_program(config, loss_fn, target.devices), target)[0]


def _try(config: Config, program: Program, target: Target) -> tuple[Trial, Any]:
    """The trial, and the compiled step, or None when the compiler refused it for lack of memory."""
    start = time.monotonic()
    try:
        compiled = compile_step(program, config)
        peak, refused = memory_bytes(compiled), False
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, peak, refused = None, refused_bytes(str(error)), True
    rows = config.train.microbatch_rows // row_devices(program.mesh.shape)
    fits = not refused and peak is not None and peak <= target.memory
    return Trial(rows, peak, fits, time.monotonic() - start), compiled


def refused_bytes(message: str) -> float | None:
    """The memory that a step would have needed, from the message with which the compiler refused it."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else None


def _bytes_per_device(tree: Any) -> float:
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )


def _moved(compiled: Any, config: Config) -> float:
    """The least bytes of a device's memory that a step reads and writes: arguments and results once, and temporaries
    written and read once in each microbatch.
    """
    analysis = compiled.memory_analysis()
    microbatches = config.train.batch_size // config.train.microbatch_rows
    once = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return once + 2.0 * analysis.temp_size_in_bytes * microbatches


def _remedy(config: Config, loss_fn: LossFn, target: Target, largest: Largest, parts: int) -> tuple[str, ...] | None:
    """The flags closest to the config with which a step fits. Tried in this order: smaller microbatches, recomputing
    activations, and splitting parameters and optimizer over all devices.
    """
    if largest.rows:
        per_device = config.train.batch_size // parts
        rows = max(each for each in range(1, largest.rows + 1) if per_device % each == 0)
        return (f"--config.train.microbatch_size={rows * parts}",)
    flags: tuple[str, ...] = (f"--config.train.microbatch_size={parts}",)
    smallest = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_size=parts))
    if largest.estimate is not None and _attempt(smallest, loss_fn, target).fits:
        return flags
    if config.compute.remat != "full":
        smallest = dataclasses.replace(smallest, compute=dataclasses.replace(config.compute, remat="full"))
        flags += ("--config.compute.remat=full",)
        if _attempt(smallest, loss_fn, target).fits:
            return flags
    sizes = mesh_sizes(config.mesh, len(target.devices))
    if sizes["data"] > 1:
        split = dataclasses.replace(config.mesh, data=1, fsdp=sizes["data"] * sizes["fsdp"])
        flags += (f"--config.mesh.data={split.data}", f"--config.mesh.fsdp={split.fsdp}")
        try:
            if _attempt(dataclasses.replace(smallest, mesh=split), loss_fn, target).fits:
                return flags
        except UserError:  # the width does not divide over this number of devices
            return None
    return None
