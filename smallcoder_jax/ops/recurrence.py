"""The one entry point to linear recurrences, with their gradients written out.

Shapes: B batch, T tokens, E channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@jax.custom_vjp
def recurrence(
    keep_BTE: Float[Array, "B T E"], new_BTE: Float[Array, "B T E"], start_BE: Float[Array, "B E"]
) -> Float[Array, "B T E"]:
    """h_t = keep_t h_{t-1} + new_t with h_{-1} = `start_BE`, in float32, by an associative scan: all h_t.

    A document begins where `keep` is 0, and a position with keep 1 and new 0 leaves the state as it is. The gradient is
    the same recurrence from the end: dnew_t = dh_t + keep_{t+1} dnew_{t+1} and dkeep_t = dnew_t h_{t-1}.
    """
    return _forward(keep_BTE, new_BTE, start_BE)[0]


def _scan(keep_BTE: Array, new_BTE: Array, *, reverse: bool) -> Array:
    """h_t = keep_t h_{t-1} + new_t, or from the end: position by position on a CPU, where this takes half the time of
    an associative scan (docs/LOG.md), and in a logarithmic number of passes elsewhere."""
    if keep_BTE.shape[1] == 1:
        return new_BTE
    if jax.default_backend() != "cpu":
        return jax.lax.associative_scan(
            lambda first, second: (first[0] * second[0], first[1] * second[0] + second[1]),
            (keep_BTE, new_BTE),
            reverse=reverse,
            axis=1,
        )[1]

    def step(h_BE: Array, position: tuple[Array, Array]) -> tuple[Array, Array]:
        h_BE = position[0] * h_BE + position[1]
        return h_BE, h_BE

    by_position = jnp.moveaxis(keep_BTE, 1, 0), jnp.moveaxis(new_BTE, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(new_BTE[:, 0]), by_position, reverse=reverse)[1], 0, 1)


def _forward(keep_BTE: Array, new_BTE: Array, start_BE: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    keep_BTE = keep_BTE.astype(jnp.float32)
    new_BTE = new_BTE.astype(jnp.float32).at[:, 0].add(keep_BTE[:, 0] * start_BE)
    h_BTE = _scan(keep_BTE, new_BTE, reverse=False)
    return h_BTE, (keep_BTE, h_BTE, start_BE)


def _backward(residuals: tuple[Array, Array, Array], dh_BTE: Array) -> tuple[Array, Array, Array]:
    keep_BTE, h_BTE, start_BE = residuals
    following_BTE = jnp.concatenate([keep_BTE[:, 1:], jnp.zeros_like(keep_BTE[:, :1])], axis=1)
    d_new_BTE = _scan(following_BTE, dh_BTE, reverse=True)
    before_BTE = jnp.concatenate([start_BE[:, None], h_BTE[:, :-1]], axis=1)
    return d_new_BTE * before_BTE, d_new_BTE, keep_BTE[:, 0] * d_new_BTE[:, 0]


recurrence.defvjp(_forward, _backward)
