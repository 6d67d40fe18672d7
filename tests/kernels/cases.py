"""Random packed rows of every kind, and attention over all their scores at once: the truth for kernels."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

THETA = 1234.5
KINDS = ("one document", "many", "one-token documents", "padding at the end", "nothing but padding")


class Case(NamedTuple):
    q: Array
    k: Array
    v: Array
    do: Array
    positions: Array
    segments: Array


def row(kind: str, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids of one row: of one of KINDS, or "some of each"."""
    padding = {"padding at the end": length // 3, "nothing but padding": length, "some of each": length // 6}
    filled = length - padding.get(kind, 0)
    if kind == "one-token documents":
        borders = list(range(length + 1))
    elif kind == "some of each":
        inner = generator.choice(np.arange(filled // 2, filled - 20), 4, replace=False)
        borders = [0, *sorted(int(border) for border in inner), *range(filled - 20, filled + 1)]
    elif kind in ("many", "padding at the end"):
        inner = generator.choice(np.arange(1, filled), min(7, filled - 1), replace=False)
        borders = [0, *sorted(int(border) for border in inner), filled]
    else:
        borders = [0, filled]
    positions, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    for number, (start, stop) in enumerate(itertools.pairwise(borders), 1):
        positions[start:stop], segments[start:stop] = np.arange(stop - start), number
    return positions, segments


def draw(
    length: int, heads: int, kv_heads: int, size: int, dtype: jnp.dtype, seed: int, kinds: tuple[str, ...] = KINDS
) -> Case:
    """One row of every kind."""
    generator = np.random.default_rng(seed)
    rows = [row(kind, length, generator) for kind in kinds]
    positions, segments = (jnp.asarray(np.stack(part)) for part in zip(*rows, strict=True))
    arrays = (
        jnp.asarray(generator.normal(size=(len(kinds), length, n, size)), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    return Case(*arrays, positions, segments)


def rotation(case: Case) -> tuple[Array, Array]:
    size = case.q.shape[-1]
    angle = case.positions.astype(jnp.float32)[:, :, None] * THETA ** (-jnp.arange(0, size, 2) / size)[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def truth(case: Case, window: int | None) -> tuple[Array, ...]:
    """Output and the gradients of q, k and v, in float32 whatever the inputs are."""
    cos, sin = (table[:, :, None, :] for table in rotation(case))

    def turn(x: Array) -> Array:
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    same = (case.segments[:, :, None] == case.segments[:, None, :]) & (case.segments[:, :, None] > 0)
    distance = case.positions[:, :, None] - case.positions[:, None, :]
    seen = same & (distance >= 0) & (distance < (window or distance.shape[1]))

    def dense(q: Array, k: Array, v: Array) -> Array:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (turn(k), v))
        scores = jnp.einsum("btnh,bsnh->bnts", turn(q), k, precision="highest") * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None, :, :], scores, -1e30), axis=-1)
        o = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
        return jnp.where(seen.any(-1)[:, :, None, None], o, 0.0)

    @jax.jit
    def everything(q: Array, k: Array, v: Array, do: Array) -> tuple[Array, ...]:
        o, pull = jax.vjp(dense, q, k, v)
        return o, *pull(do)

    return everything(*(x.astype(jnp.float32) for x in case[:4]))


def relative_error(got: Array, want: Array) -> float:
    """The largest difference over the largest entry; NaN or infinity anywhere counts as infinite."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / np.abs(b).max())
