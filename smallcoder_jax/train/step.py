"""The training step (the only value_and_grad) and the evaluation step.

Shapes: B rows, T tokens per row, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from smallcoder_jax.config import GuardConfig
from smallcoder_jax.mesh import batch_sharding, on_mesh, replicated
from smallcoder_jax.ops import precision
from smallcoder_jax.train import guard
from smallcoder_jax.train.state import TrainState

Batch = dict[str, Array]
# (params, batch, RNG key) -> (loss_sum, weight_sum, sums). The key is None in an evaluation. `params` holds all parts,
# both trained and frozen.
LossFn = Callable[[Any, Batch, Array | None], tuple[Array, Array, dict[str, Array]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    share: optax.Schedule,
    *,
    reported: Sequence[str],
    peak: float,
    microbatches: int,
    guarding: GuardConfig,
    matmul: precision.Kind,
    mesh: Mesh,
    shardings: TrainState,
    frozen_shardings: Any,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]]:
    """The jitted step (state, batch, frozen parameters) -> (state, metrics). The state is donated; metrics are float32
    scalars.

    The sums that `reported` names become metrics, divided by the sum of weights. The step computes the gradient of
    loss_sum / weight_sum over the whole batch, whatever the number of microbatches. When loss or gradient is not sound
    (`train.guard`), parameters and optimizer do not change and `skipped` is 1.
    """

    def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_of(params: Any, part: Batch, index: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            loss_sum, weight_sum, sums = loss_fn({**frozen, **params}, part, jax.random.fold_in(key, index))
            return loss_sum, (weight_sum, {"loss": loss_sum, **{name: sums[name] for name in reported}})

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        gradients, weight, sums = _accumulate(gradient_of, state.params, batch, microbatches)
        denominator = jnp.maximum(weight, 1.0)
        # XLA fuses this product into its users. It would materialise a quotient: a second tree of gradients.
        per_token = 1.0 / denominator
        gradients = jax.tree.map(lambda g: g * per_token, gradients)
        loss, grad_norm = sums["loss"] / denominator, optax.global_norm(gradients)
        sound = guard.is_sound(guarding, state.guard, loss, grad_norm)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params, sound=sound)
        params = guard.select(sound, optax.apply_updates(state.params, updates), state.params)
        guarded = guard.advance(guarding, state.guard, sound, loss)
        metrics = {
            "loss": loss,
            **{name: sums[name] / denominator for name in reported},
            # Not the sum of weights, which for pairs of answers is their number.
            "tokens": jnp.sum(batch["loss_weights"] > 0, dtype=jnp.float32),
            "grad_norm": grad_norm,
            # The optimizer counts only the updates that were applied.
            "learning_rate": jnp.float32(peak) * share(state.step - state.guard.skipped),
            "skipped": 1.0 - sound.astype(jnp.float32),
            "skipped_in_a_row": guarded.skipped_in_a_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, optimizer_state, state.key, guarded), metrics

    return jax.jit(
        on_mesh(mesh, precision.multiplying(matmul, step)),
        in_shardings=(shardings, batch_sharding(mesh), frozen_shardings),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _accumulate(gradient_of: Any, params: Any, batch: Batch, microbatches: int) -> tuple[Any, Array, dict[str, Array]]:
    """Sums of gradients, weights and metrics over the microbatches. Each microbatch takes every M-th row, so that all
    devices take part in it.
    """

    def sums_of(index: Array, rows: Batch) -> tuple[Any, Array, dict[str, Array]]:
        (_, (weight, sums)), gradients = gradient_of(params, rows, index)
        return gradients, weight, sums

    if microbatches == 1:
        return sums_of(jnp.int32(0), batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums_of(*part)), None

    indices = jnp.arange(microbatches, dtype=jnp.int32)
    shapes = jax.eval_shape(sums_of, indices[0], jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, (indices, parts))[0]


def make_eval_step(
    loss_fn: LossFn, *, matmul: precision.Kind, mesh: Mesh, shardings: Any, frozen_shardings: Any
) -> Callable[[Any, Batch, Any], dict[str, Array]]:
    """The jitted evaluation step: (params, batch, frozen parameters) -> the sums of the loss, and `weight`."""

    def step(params: Any, batch: Batch, frozen: Any) -> dict[str, Array]:
        _, weight, sums = loss_fn({**frozen, **params}, batch, None)
        return {**sums, "weight": weight}

    return jax.jit(
        on_mesh(mesh, precision.multiplying(matmul, step)),
        in_shardings=(shardings, batch_sharding(mesh), frozen_shardings),
        out_shardings=replicated(mesh),
    )
