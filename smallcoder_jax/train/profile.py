"""A trace of some training steps, for XProf and Perfetto (`log.profile_steps`)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
from clu import profiler

from smallcoder_jax.config import LogConfig, profiled_steps

NOT_TRACED = contextlib.nullcontext()


class StepProfile:
    """Traces the steps that `log.profile_steps` names into `folder`: every operation on host and devices with its time.

    A traced step is waited for, which a step otherwise is not, so that what follows it is not in the trace.
    """

    def __init__(self, log: LogConfig, folder: Path):
        self._first, self._stop = profiled_steps(log.profile_steps) or (0, 0)
        self._folder, self._running = folder, False

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """What a step is dispatched in: it names the step in the trace, and begins the trace before the first."""
        if number == self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.start(str(self._folder))
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else NOT_TRACED

    def after(self, step: int, results: Any) -> bool:
        """To be called with what the dispatched step will have written. Returns whether a trace was written now."""
        if not self._running:
            return False
        jax.block_until_ready(results)
        if step < self._stop - 1:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Writes what was traced, when a run ends in the middle of it."""
        if self._running:
            self._running = False
            profiler.stop()
