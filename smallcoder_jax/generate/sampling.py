"""Chooses the next token: the options, which are checked once, and the arithmetic on the device.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smallcoder_jax.base.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The options of a completion. Raises UserError for a value outside its range.

    They are applied in this order: repetition penalty, temperature, top-k, top-p. Every prompt gets `num_samples`
    completions. A text ends before the first occurrence of a `stop` string. With `truncate_prompt`, a prompt that
    leaves no room for `max_tokens` in the model's context loses its start instead of being refused.
    """

    max_tokens: int = 200
    temperature: float = 0.7  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 0.9  # 1: off
    repetition_penalty: float = 1.0  # over prompt and completion (CTRL, arXiv 1909.05858, section 4.1); 1: off
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    truncate_prompt: bool = False

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1"),
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                f"temperature={self.temperature} must be 0 (greedy) or a positive number",
            ),
            (0 <= self.top_k < 2**31, f"top_k={self.top_k} must be 0 (off) or the number of tokens to choose from"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1 (off)"),
            (
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                f"repetition_penalty={self.repetition_penalty} must be positive; 1 is off, above 1 repeats less",
            ),
            (0 <= self.seed < 2**32, f"seed={self.seed} must be between 0 and {2**32 - 1}"),
            (self.num_samples >= 1, f"num_samples={self.num_samples} must be at least 1"),
            (
                isinstance(self.stop, tuple | list) and all(map(_is_text, self.stop)),
                f"stop={self.stop!r} must be a sequence of strings, none of them empty, all of them valid Unicode",
            ),
        ]
        for holds, message in checks:
            if not holds:
                raise UserError(message)


def _is_text(stop: object) -> bool:
    return isinstance(stop, str) and stop != "" and not any("\ud800" <= character <= "\udfff" for character in stop)


class Settings(NamedTuple):
    """The numeric options, one value per row. They are data, not code, so other values need no compilation."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    repetition_penalty_B: Array


def settings_of(options: SamplingOptions, rows: int, place: jax.sharding.Sharding) -> Settings:
    """The numeric options for `rows` rows, on the device."""
    columns = (
        np.full(rows, options.temperature, np.float32),
        np.full(rows, options.top_k, np.int32),
        np.full(rows, options.top_p, np.float32),
        np.full(rows, options.repetition_penalty, np.float32),
    )
    return Settings(*jax.device_put(columns, place))


def penalise(logits_BV: Array, seen_BV: Array, penalty_B: Array) -> Array:
    """The logits, where those of tokens that occurred are divided by the penalty if positive, else multiplied."""
    penalty_B1 = penalty_B[:, None]
    punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, punished_BV, logits_BV)


def best(scores_BV: Array, weights_BV: Array, needed_B: Array) -> Array:
    """A mask, bool [B, V], of the fewest best-scored entries of each row whose weights add up to `needed_B`.

    Entries that tie with the last one kept are kept too. All are kept when the whole row does not reach `needed_B`. The
    threshold is found by bisecting the range of float32 bit patterns, with 32 sums over V, because sorting the
    vocabulary costs more than a small model's forward pass.
    """
    bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.int32)
    # Bit patterns of negative floats, read as integers, are in reverse order. Flipped, all are in the floats' order.
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # the mean, rounded up, without overflow
        enough_B = jnp.where(order_BV >= middle_B[:, None], weights_BV, 0.0).sum(axis=1) >= needed_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B - 1)

    limits = jnp.iinfo(jnp.int32)
    bounds = (jnp.full_like(order_BV[:, 0], limits.min), jnp.full_like(order_BV[:, 0], limits.max))
    threshold_B, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return order_BV >= threshold_B[:, None]


def probabilities(scores_BV: Array, settings: Settings) -> Array:
    """The distribution to sample from: softmax at the temperature, restricted to the top-k and then to the top-p.

    Rows with temperature 0 are computed at temperature 1. The caller takes their best entry instead of sampling.
    """
    temperature_B = jnp.where(settings.temperature_B > 0, settings.temperature_B, 1.0)
    scaled_BV = (scores_BV - scores_BV.max(axis=1, keepdims=True)) / temperature_B[:, None]
    has_top_k_B, has_top_p_B = settings.top_k_B > 0, settings.top_p_B < 1

    def cut_to_top_k(scaled_BV: Array) -> Array:
        needed_B = jnp.where(has_top_k_B, settings.top_k_B, scores_BV.shape[1]).astype(jnp.float32)
        return jnp.where(best(scaled_BV, jnp.ones_like(scaled_BV), needed_B), scaled_BV, -jnp.inf)

    def cut_to_top_p(scaled_BV: Array) -> Array:
        in_top_p_BV = best(scaled_BV, jax.nn.softmax(scaled_BV, axis=1), settings.top_p_B)
        return jnp.where(in_top_p_BV | ~has_top_p_B[:, None], scaled_BV, -jnp.inf)

    # A restriction that no row asks for is not computed.
    scaled_BV = jax.lax.cond(has_top_k_B.any(), cut_to_top_k, lambda scaled_BV: scaled_BV, scaled_BV)
    scaled_BV = jax.lax.cond(has_top_p_B.any(), cut_to_top_p, lambda scaled_BV: scaled_BV, scaled_BV)
    return jax.nn.softmax(scaled_BV, axis=1)


def choose(logits_BV: Array, seen_BV: Array, suppressed_V: Array, settings: Settings, keys_B: Array) -> Array:
    """The next token of every row, int32 [B]: the best one at temperature 0, else one sampled with the row's key.

    `seen_BV` marks the tokens to which the repetition penalty applies. Tokens in `suppressed_V` are never chosen.
    """
    scores_BV = penalise(logits_BV, seen_BV, settings.repetition_penalty_B)
    scores_BV = jnp.where(suppressed_V[None, :], -jnp.inf, scores_BV)
    greedy_B = jnp.argmax(scores_BV, axis=1).astype(jnp.int32)

    def draw() -> Array:
        probability_BV = probabilities(scores_BV, settings)
        cumulative_BV = jnp.cumsum(probability_BV, axis=1)
        point_B = jax.vmap(lambda key: jax.random.uniform(key))(keys_B) * cumulative_BV[:, -1]
        # Parallel float32 sums are not strictly monotone. The second condition excludes tokens of probability 0.
        drawn_B = jnp.argmax((cumulative_BV > point_B[:, None]) & (probability_BV > 0), axis=1).astype(jnp.int32)
        return jnp.where(settings.temperature_B > 0, drawn_B, greedy_B)

    return jax.lax.cond((settings.temperature_B > 0).any(), draw, lambda: greedy_B)
