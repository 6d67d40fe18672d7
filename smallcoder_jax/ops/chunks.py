"""Processing tokens chunk by chunk; on a mesh each device processes its own tokens.

Shapes: X tokens, N chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from smallcoder_jax.mesh import TOKEN_AXES, TOKENS


def on_own_tokens(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(shared, *per_token)`, which on a mesh runs on each device's own tokens. The results are concatenated
    along the first axis. Without this, XLA would gather the whole token axis for a loop over it, and would sum the
    unembedding's gradient over the devices in every iteration. The split of the vocabulary over `tensor` is left to
    XLA.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return function

    def split(shared: Any, *per_token: Array) -> Any:
        in_specs, axes = (P(), *[TOKENS] * len(per_token)), set(TOKEN_AXES)
        run = jax.shard_map(function, in_specs=in_specs, out_specs=TOKENS, axis_names=axes, check_vma=False)
        return run(shared, *per_token)

    return split


def in_chunks(operands: Any, chunk: int) -> Any:
    """[X, ...] to [N, chunk, ...], padded with zeros."""

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, chunk, *x.shape[1:])

    return jax.tree.map(split, operands)
