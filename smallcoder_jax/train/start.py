"""Finds where a run starts: at its newest sound checkpoint, with another run's parameters, or with random ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from smallcoder_jax.base.terminal import Terminal
from smallcoder_jax.config import Config
from smallcoder_jax.models import build
from smallcoder_jax.train.checkpoint import Checkpointer
from smallcoder_jax.train.history import History
from smallcoder_jax.train.program import Program
from smallcoder_jax.train.records import Records
from smallcoder_jax.train.state import TrainState, init_state
from smallcoder_jax.train.task import Task


@dataclasses.dataclass(frozen=True)
class Start:
    """The state from which training continues. `saved_step` and `data_state` come from the checkpoint, if any."""

    state: TrainState
    history: History
    data_state: Any = None
    saved_step: int | None = None


def find_start(
    config: Config, task: Task, program: Program, checkpointer: Checkpointer, records: Records, terminal: Terminal
) -> Start:
    """The start of the run. Raises UserError when the checkpoints belong to another run, or none of them is sound."""
    # Checkpoints may have been copied here without their run.json, or next to another run's.
    restored = checkpointer.restore_newest(
        program.state, lambda meta: records.refuse_another_run(meta.get("identity")), terminal.note
    )
    if restored is None:
        return _first(config, task, program, terminal)
    step = int(restored.state.step)
    terminal.note(f"resuming at step {step} of {checkpointer.folder.parent}")
    return Start(restored.state, History.from_meta(restored.meta), restored.data_state, step)


def _first(config: Config, task: Task, program: Program, terminal: Terminal) -> Start:
    """The start of a new run. If it begins with another run's parameters, it owes an evaluation before the first step,
    which later ones can be compared with.
    """
    start = task.start
    if start is None:
        return Start(
            jax.jit(lambda: init_state(config, program.optimizer), out_shardings=program.shardings)(), History()
        )
    terminal.note(f"begins with the parameters of {start.facts['path']}, and a fresh optimizer")
    # Adapters are initialised at random, and the start model is among the frozen parts.
    params = {} if config.lora.rank else build.to_layout(start.params, config.compute)
    shardings = {name: program.shardings.params[name] for name in params}
    state = jax.jit(
        lambda params: init_state(config, program.optimizer, params),
        in_shardings=(shardings,),
        out_shardings=program.shardings,
    )(params)
    return Start(state, History(owes_evaluation=True))
