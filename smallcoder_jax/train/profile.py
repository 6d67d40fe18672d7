"""Traces some training steps for XProf and Perfetto (`log.profile_steps`)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
from clu import profiler

from smallcoder_jax.config import LogConfig, profiled_steps

NOT_TRACED = contextlib.nullcontext()


class StepProfile:
    """Traces the steps in `log.profile_steps` into `folder`: every operation on host and devices with its time.

    Unlike other steps, traced steps are waited for, so that the trace does not contain what follows them.
    """

    def __init__(self, log: LogConfig, folder: Path):
        self._first, self._stop = profiled_steps(log.profile_steps) or (0, 0)
        self._folder, self._running = folder, False

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """The context in which to dispatch a step. It names the step in the trace; the first one starts the trace."""
        if number == self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.start(str(self._folder))
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else NOT_TRACED

    def after(self, step: int, results: Any) -> bool:
        """To be called after a step is dispatched, with its future results. Returns whether a trace was written now."""
        if not self._running:
            return False
        jax.block_until_ready(results)
        if step < self._stop - 1:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Writes the trace of a run that ends while it is being traced."""
        if self._running:
            self._running = False
            profiler.stop()
