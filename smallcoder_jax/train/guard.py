"""Decides which updates are applied: not those whose loss or gradient is not finite, nor, by configuration, spikes.

The decision is made in the compiled step from values in the training state, so a continued run decides alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from smallcoder_jax.config import GuardConfig


class GuardState(NamedTuple):
    """The numbers of updates skipped in total and in a row, and moving averages of the losses of applied updates."""

    skipped: Array  # int32, as are the next two
    skipped_in_a_row: Array
    taken: Array
    mean: Array  # float32, as is the next
    variance: Array


def init_guard() -> GuardState:
    return GuardState(*(jnp.int32(0) for _ in range(3)), *(jnp.float32(0) for _ in range(2)))


def is_sound(guard: GuardConfig, state: GuardState, loss: Array, grad_norm: Array) -> Array:
    """Whether a step with this mean loss and global gradient norm may update the parameters: bool scalar.

    A spike is a loss more than `spike_sigma` standard deviations above the moving average. None is detected before
    `spike_window` updates have been applied.
    """
    sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if guard.spike_sigma:
        limit = state.mean + guard.spike_sigma * jnp.sqrt(state.variance)
        sound &= (state.taken < guard.spike_window) | (loss <= limit)
    return sound


def advance(guard: GuardConfig, state: GuardState, sound: Array, loss: Array) -> GuardState:
    """The state after a step. The averages follow West (1979), with weights 1/n at first and 1/`spike_window` later."""
    weight = 1.0 / jnp.minimum(state.taken + 1, guard.spike_window).astype(jnp.float32)
    difference = loss - state.mean
    mean = state.mean + weight * difference
    variance = (1.0 - weight) * (state.variance + weight * difference * difference)
    taken = GuardState(state.skipped, jnp.zeros_like(state.skipped_in_a_row), state.taken + 1, mean, variance)
    skipped = state._replace(skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
    return select(sound, taken, skipped)


def select(condition: Array, chosen: Any, otherwise: Any) -> Any:
    """`chosen` if the scalar `condition` is true, else `otherwise`; both are trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)
