"""Where a run begins: at its newest sound checkpoint, with the parameters of another, or with drawn ones."""

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
    """What training goes on from. `saved_step`, `data_state`: of the checkpoint; None where there is none."""

    state: TrainState
    history: History
    data_state: Any = None
    saved_step: int | None = None


def find_start(
    config: Config, task: Task, program: Program, checkpointer: Checkpointer, records: Records, terminal: Terminal
) -> Start:
    """Raises UserError where the checkpoints are another run's, or none of them is sound."""
    # Checkpoints may have come here without their run.json, or beside another.
    restored = checkpointer.restore_newest(
        program.state, lambda meta: records.refuse_another_run(meta.get("identity")), terminal.note
    )
    if restored is None:
        return _first(config, task, program, terminal)
    step = int(restored.state.step)
    terminal.note(f"resuming at step {step} of {checkpointer.folder.parent}")
    return Start(restored.state, History.from_meta(restored.meta), restored.data_state, step)


def _first(config: Config, task: Task, program: Program, terminal: Terminal) -> Start:
    """A run that begins with another's parameters is evaluated first: what it was before is known then."""
    start = task.start
    if start is None:
        return Start(
            jax.jit(lambda: init_state(config, program.optimizer), out_shardings=program.shardings)(), History()
        )
    terminal.note(f"begins with the parameters of {start.facts['path']}, and a fresh optimizer")
    # Adapters are drawn, and the start stays as it is beside them.
    params = {} if config.lora.rank else build.to_layout(start.params, config.compute)
    shardings = {name: program.shardings.params[name] for name in params}
    state = jax.jit(
        lambda params: init_state(config, program.optimizer, params),
        in_shardings=(shardings,),
        out_shardings=program.shardings,
    )(params)
    return Start(state, History(owes_evaluation=True))
