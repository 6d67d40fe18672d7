"""Which updates the guard lets through, and what it remembers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import GuardConfig
from smallcoder_jax.train.guard import GuardState, advance, init_guard, is_sound


def after(config: GuardConfig, losses: list[float], norm: float = 1.0) -> tuple[GuardState, list[bool]]:
    state, taken = init_guard(), []
    for loss in losses:
        sound = is_sound(config, state, jnp.float32(loss), jnp.float32(norm))
        state = advance(config, state, sound, jnp.float32(loss))
        taken.append(bool(sound))
    return state, taken


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_and_counted(bad: float) -> None:
    state, taken = after(GuardConfig(), [3.0, bad, bad, 2.0, bad])
    assert taken == [True, False, False, True, False]
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.taken)) == (3, 1, 2)
    assert float(state.mean) == 2.5  # what was skipped leaves no trace
    assert after(GuardConfig(), [3.0], norm=bad)[1] == [False]


def test_averages_are_those_of_all_losses_while_the_window_fills() -> None:
    losses = np.random.default_rng().normal(4.0, 0.5, 50)
    state, _ = after(GuardConfig(spike_window=100), [float(loss) for loss in losses])
    np.testing.assert_allclose(float(state.mean), losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(float(state.variance), losses.var(), rtol=1e-4)


def test_old_losses_are_forgotten() -> None:
    state, _ = after(GuardConfig(spike_window=10), [9.0] * 20 + [1.0] * 100)
    np.testing.assert_allclose(float(state.mean), 1.0, atol=1e-3)


def test_a_spike_is_skipped_by_policy_only_and_only_once_the_window_is_full() -> None:
    calm = [2.0, 2.2] * 5
    assert after(GuardConfig(spike_window=10), [*calm, 50.0])[1][-1]
    watched = GuardConfig(spike_sigma=4.0, spike_window=10)
    assert after(watched, [*calm, 50.0, 2.2])[1][-2:] == [False, True]
    assert after(watched, [*calm, 2.4])[1][-1]  # 3 standard deviations above
    assert after(watched, [*calm[:9], 50.0])[1][-1]  # too early to know
    assert after(watched, [*calm, 0.1])[1][-1]  # a loss that falls is none
