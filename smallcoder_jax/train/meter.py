"""Measures the speed of a run, and how close it is to the peak of its device."""

from __future__ import annotations

import time

from jax.sharding import Mesh

from smallcoder_jax.config import Config
from smallcoder_jax.models.families import family_of
from smallcoder_jax.train.flops import peak_flops


class Meter:
    """Measures the wall time per step, excluding evaluations and saves."""

    def __init__(self, config: Config, mesh: Mesh):
        self.flops = family_of(config.model).flops_per_token(config.model, config.train.sequence_length)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self.peak = None if peak is None else peak * mesh.devices.size
        self.last = time.monotonic()
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0

    def pause(self) -> None:
        self.paused = time.monotonic()

    def resume(self) -> None:
        self.last += time.monotonic() - self.paused

    def step(self, tokens: int, waited: float) -> dict[str, float]:
        """The rates of the step that has just finished."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.waited, self.steps = self.waited + waited, self.steps + 1
        return self._rates(tokens, seconds, waited, 1)

    def interval(self) -> dict[str, float]:
        """The rates since the last call."""
        rates = self._rates(self.tokens, self.seconds, self.waited, self.steps)
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0
        return rates

    def _rates(self, tokens: int, seconds: float, waited: float, steps: int) -> dict[str, float]:
        """The rates by name. `mfu` is included only if the device's peak is known."""
        rate = tokens / max(seconds, 1e-9)
        rates = {"tokens_per_second": rate, "data_wait": waited / steps, "step_time": seconds / steps}
        return rates if self.peak is None else {**rates, "mfu": rate * self.flops / self.peak}
