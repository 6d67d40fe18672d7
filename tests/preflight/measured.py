"""Run as a process: by how much resident memory grows for a training step of a config, beside preflight's figure.

    python -m tests.preflight.measured configs/nano.py

The figure is that of a device's arrays and buffers, so what a process takes once, whatever the config (the interpreter,
the compiler, threads, code), is not part of it: the same step has run before, and all its arrays are gone, when the
baseline is taken. Then state and batch are made anew, steps run, and the highest resident size since is read from
Linux. Prints both, in bytes, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from smallcoder_jax.base.runtime import give_back_memory
from smallcoder_jax.configfile import load_config
from smallcoder_jax.preflight.examine import examine
from smallcoder_jax.preflight.target import Target
from smallcoder_jax.stages.shared.next_token import make_loss
from smallcoder_jax.train.program import abstract_batch, compile_step, make_program, memory_bytes
from smallcoder_jax.train.state import init_state

STEPS = 3


def resident(field: str) -> int:
    """`VmRSS`, or `VmHWM`, the highest since it was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main(path: str) -> None:
    config = load_config(path, [])
    program = make_program(config, make_loss(config))
    step = compile_step(program, config)
    shapes = abstract_batch(config, program.mesh)
    init = jax.jit(lambda: init_state(config, program.optimizer), out_shardings=program.shardings).lower().compile()

    def make_batch() -> dict[str, jax.Array]:
        return {name: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding) for name, x in shapes.items()}

    def run() -> None:
        state: Any = init()
        batch = make_batch()
        jax.block_until_ready((state, batch))
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        for _ in range(STEPS):
            state, metrics = step(state, batch, {})
            jax.block_until_ready((state, metrics))

    run()
    give_back_memory()
    before = resident("VmRSS")
    run()
    measured = resident("VmHWM") - before
    # With no more memory than the step takes, no larger one is searched for.
    report = examine(config, make_loss(config), Target("cpu", jax.devices(), memory_bytes(step), ""))
    print(json.dumps({"measured": measured, "reported": report.memory.peak}))


if __name__ == "__main__":
    main(sys.argv[1])
