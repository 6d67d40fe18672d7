"""The optimizer: gradient clipping, AdamW or Muon, decoupled weight decay by name pattern, and the schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import OptimizerConfig
from smallcoder_jax.mesh import parameter_name
from smallcoder_jax.ops.precision import product

# Newton-Schulz coefficients of Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def schedule(optimizer: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a fraction of its peak, by optimizer step (never by microbatch).

    The warm-up is linear: (step + 1) / warmup_steps. After it, `cosine` and `linear` fall to final_ratio at the last
    step, `constant` stays at the peak, and `wsd` stays there and then falls linearly to final_ratio over the last
    decay_steps (arXiv 2404.06395).
    """
    warmup, final = optimizer.warmup_steps, optimizer.final_ratio
    decay_start = steps - optimizer.decay_steps if optimizer.schedule == "wsd" else warmup

    def share(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - decay_start) / max(steps - 1 - decay_start, 1), 0.0, 1.0)
        if optimizer.schedule == "cosine":
            after = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif optimizer.schedule == "constant":
            after = jnp.ones_like(done)
        else:
            after = 1 - (1 - final) * done
        return jnp.where(step < warmup, (step + 1) / max(warmup, 1), after)

    return share


def make_optimizer(
    optimizer: OptimizerConfig, steps: int, muon: str, rates: Sequence[tuple[str, float]] = ()
) -> optax.GradientTransformationExtraArgs:
    """clip -> (AdamW | Muon on hidden matrices, AdamW on the rest) -> decay -> schedule, as one optax chain.

    `muon` is a pattern for the names of the parameters that Muon updates. Updates are multiplied by the rate of the
    first pattern in `rates` that matches. Both apply to a critic's parameters too.

    The updates are to be added to the parameters. Where the argument `sound` of `update` (a bool scalar) is false, the
    optimizer's state does not change and the updates are meaningless. Raises UserError when `decay_pattern` is not a
    regular expression.
    """
    try:
        pattern = re.compile(optimizer.decay_pattern)
    except re.error as error:
        raise UserError(f"optimizer.decay_pattern={optimizer.decay_pattern!r} is not a pattern: {error}") from error
    share, hidden = schedule(optimizer, steps), re.compile(rf"(critic/)?({muon})")

    def finish(peak: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(
                optimizer.weight_decay, mask=lambda params: _by_path(params, lambda name: bool(pattern.fullmatch(name)))
            ),
            optax.scale_by_schedule(lambda step: -peak * share(step)),
        )

    adam = optax.chain(scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps), finish(optimizer.learning_rate))
    if optimizer.name == "adamw":
        update = adam
    else:
        update = optax.partition(
            {
                "muon": optax.chain(scale_by_muon(optimizer.muon_momentum), finish(optimizer.muon_learning_rate)),
                "adam": adam,
            },
            lambda params: _by_path(params, lambda name: "muon" if hidden.fullmatch(name) else "adam"),
        )
    clip = clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm > 0 else optax.identity()
    chain = optax.with_extra_args_support(optax.chain(clip, update))

    def guarded(updates: Any, state: Any, params: Any = None, *, sound: Any = True) -> tuple[Any, Any]:
        updates, after = chain.update(updates, state, params, sound=sound)
        if rates:
            scales = _by_path(updates, lambda name: _rate(rates, name.removeprefix("critic/")))
            updates = jax.tree.map(lambda update, scale: update * scale, updates, scales)
        # The moments have been kept already; the scalars of the state, which count updates, remain.
        return updates, jax.tree.map(lambda new, old: new if new.ndim else jnp.where(sound, new, old), after, state)

    return optax.GradientTransformationExtraArgs(chain.init, guarded)


def _rate(rates: Sequence[tuple[str, float]], name: str) -> float:
    return next((rate for pattern, rate in rates if re.fullmatch(pattern, name)), 1.0)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales updates whose global norm is above `largest` down to that norm (arXiv 1211.5063). All are multiplied by
    one scalar, which XLA fuses. optax's version divides, which keeps a second tree of gradients in memory.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, largest / jnp.maximum(optax.global_norm(updates), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda update: update * scale.astype(update.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Adam (arXiv 1412.6980), with moments that do not change where `sound` is false.

    The update is computed from the moments after that selection. Computed from the new moments before it, XLA's CPU
    backend would keep both in memory.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None, *, sound: Any = True) -> tuple[Any, Any]:
        del params

        def moment(decay: float, before: Array, new: Array) -> Array:
            return jnp.where(sound, decay * before + (1 - decay) * new, before)

        count = optax.safe_increment(state.count)
        mean = jax.tree.map(lambda m, g: moment(b1, m, g), state.mu, updates)
        square = jax.tree.map(lambda v, g: moment(b2, v, g * g), state.nu, updates)
        steps = jnp.asarray(count, jnp.float32)
        of_mean, of_square = 1.0 / (1.0 - b1**steps), 1.0 / (1.0 - b2**steps)
        updates = jax.tree.map(lambda m, v: m * of_mean / (jnp.sqrt(v * of_square) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(momentum: float) -> optax.GradientTransformationExtraArgs:
    """Muon: Nesterov momentum, then each matrix is replaced by the nearest semi-orthogonal matrix and scaled by
    sqrt(max(1, out / in)), so that one learning rate suits every shape. Leading axes (scanned layers) are batch axes.
    Where `sound` is false the momentum does not change.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None, *, sound: Any = True) -> tuple[Any, MuonState]:
        del params

        def blend(m: Array, g: Array) -> Array:
            return momentum * m + (1 - momentum) * g

        mean = jax.tree.map(lambda m, g: jnp.where(sound, blend(m, g), m), state.momentum, updates)
        return _orthogonal_updates(jax.tree.map(blend, mean, updates)), MuonState(mean)

    return optax.GradientTransformationExtraArgs(init, update)


def _orthogonal_updates(tree: Any) -> Any:
    """Orthogonalises every matrix, all matrices of the same shape together in one batched product."""
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(leaf.shape, []).append(index)
    for shape, indices in groups.items():
        scale = max(1.0, shape[-1] / shape[-2]) ** 0.5
        result = scale * orthogonalize(jnp.stack([leaves[i] for i in indices]))
        for position, index in enumerate(indices):
            leaves[index] = result[position]
    return jax.tree.unflatten(structure, leaves)


def orthogonalize(matrix: Array) -> Array:
    """Approximates U V^T of the singular value decomposition of the last two axes by Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-1, -2), keepdims=True)) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = product("...ij,...kj->...ik", x, x, x.dtype)
        polynomial = b * gram + c * product("...ij,...jk->...ik", gram, gram, x.dtype)
        x = a * x + product("...ij,...jk->...ik", polynomial, x, x.dtype)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _by_path(params: Any, label: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: label(parameter_name(path)), params)
