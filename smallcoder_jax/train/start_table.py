"""The table that a run shows before its first step: model, memory and mesh."""

from __future__ import annotations

from typing import Any

import jax

from smallcoder_jax.base.terminal import human_bytes
from smallcoder_jax.config import Config
from smallcoder_jax.train.program import Program
from smallcoder_jax.train.state import TrainState


def start_sections(
    config: Config, program: Program, state: TrainState, frozen: Any, memory: Any
) -> dict[str, dict[str, str]]:
    """Section -> name -> value. `memory` is XLA's analysis of the compiled step, or None."""
    mesh = program.mesh
    count, frozen_count = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, frozen))
    chunk = program.cross_entropy.chunk
    recurrence = "; ".join(map(str, program.recurrence))
    sections = {
        "model": {
            "parameters": f"{count:,}" + (f" trained, {frozen_count:,} frozen" if frozen_count else ""),
            "shape": config.model.summary(),
            "compute": f"{config.compute.dtype}, layers {config.compute.layers}, remat {config.compute.remat}",
            "products": f"{program.matmul.kind} ({program.matmul.reason})",
            "attention": f"{program.attention.implementation} ({program.attention.reason})",
            **({"recurrence": recurrence} if recurrence else {}),
            "cross-entropy": f"{'all tokens at once' if chunk is None else f'{chunk} tokens at a time'} "
            f"({program.cross_entropy.reason})",
        },
        "memory": {},
        "mesh": {
            "devices": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
            "axes": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        },
    }
    if memory is not None:
        sections["memory"] = {
            "state": human_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / mesh.devices.size),
            "step": f"{human_bytes(memory.temp_size_in_bytes)} of temporaries per device",
        }
    return sections
