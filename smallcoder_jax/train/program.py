"""Assembles a training step from a config and a loss, for devices that need not be present."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smallcoder_jax import optim
from smallcoder_jax.config import Config, ModelConfig
from smallcoder_jax.mesh import batch_sharding, check_length, make_mesh, params_sharding
from smallcoder_jax.models import build, lora
from smallcoder_jax.models.families import family_of
from smallcoder_jax.ops import attention, cross_entropy, precision, recurrence
from smallcoder_jax.train.state import TrainState, init_state, state_sharding
from smallcoder_jax.train.step import LossFn, make_train_step


class Program(NamedTuple):
    """The jitted step of `make_train_step` and its parts. `state` and `frozen` are shapes with shardings."""

    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState
    shardings: TrainState
    frozen: Any
    frozen_shardings: Any
    step: Any
    attention: attention.Choice
    recurrence: tuple[recurrence.Choice, ...]  # different ones only; empty: there are no recurrences
    cross_entropy: cross_entropy.Choice
    matmul: precision.Choice


def make_program(
    config: Config,
    loss_fn: LossFn,
    devices: list[Any] | None = None,
    *,
    reported: Sequence[str] = ("accuracy",),
    frozen: Any = None,
    frozen_model: ModelConfig | None = None,
) -> Program:
    """Builds the program without compiling anything or allocating device memory.

    `devices` may be of any platform, including those of a topology; None means all devices. `reported` is as in
    `make_train_step`. `frozen` holds the parts that are not trained, as arrays or shapes; they belong to `frozen_model`
    if that is given. Without `frozen`, it is the shapes of the base model if adapters are trained, and else empty.
    Raises UserError when config and devices do not fit together.
    """
    train, model, family = config.train, config.model, family_of(config.model)
    mesh = make_mesh(config.mesh, model, train.microbatch_rows, devices)
    length, device = train.sequence_length, mesh.devices.flat[0]
    check_length(mesh.shape, length)
    optimizer = optim.make_optimizer(config.optimizer, train.steps, family.muon, family.rates(model))
    shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    shardings = state_sharding(mesh, shapes, family.sharding)
    if frozen is None:
        _, own = build.abstract_model(model, config.compute)
        frozen = lora.beside(config.lora, own) if config.lora.rank else {}
    frozen_shardings = params_sharding(mesh, frozen, family_of(frozen_model or model).sharding)
    matmul = precision.choose(config.compute, device.platform)
    return Program(
        mesh=mesh,
        optimizer=optimizer,
        state=_placed(shapes, shardings),
        shardings=shardings,
        frozen=_placed(frozen, frozen_shardings),
        frozen_shardings=frozen_shardings,
        step=make_train_step(
            loss_fn,
            optimizer,
            optim.schedule(config.optimizer, train.steps),
            reported=(*reported, *family.logged(model)),
            peak=config.optimizer.peak_learning_rate,
            microbatches=train.batch_size // train.microbatch_rows,
            guarding=config.guard,
            matmul=matmul.kind,
            mesh=mesh,
            shardings=shardings,
            frozen_shardings=frozen_shardings,
        ),
        attention=_attention(config, mesh),
        recurrence=_recurrence(config, mesh),
        cross_entropy=cross_entropy.choose(
            train.microbatch_rows * length, model.vocab_size, config.compute.dtype, mesh.shape
        ),
        matmul=matmul,
    )


def _attention(config: Config, mesh: Mesh) -> attention.Choice:
    device = mesh.devices.flat[0]
    shape = family_of(config.model).attention_shape(config.model, config.train.sequence_length)
    if shape is None:
        return attention.Choice("none", f"this model with model.family={config.model.family!r} has none")
    length, group, head_size = shape
    return attention.choose(
        config.compute.attention,
        length,
        length,
        group,
        head_size,
        config.compute.dtype,
        device.platform,
        device.device_kind,
        context=mesh.shape["context"],
    )


def _recurrence(config: Config, mesh: Mesh) -> tuple[recurrence.Choice, ...]:
    device = mesh.devices.flat[0]
    shapes = family_of(config.model).recurrence_shapes(config.model, config.train.sequence_length)
    found = [
        recurrence.choose(
            config.compute.recurrence, length, width, [jnp.float32], device.platform, device.device_kind,
            context=mesh.shape["context"], tensor=mesh.shape["tensor"],
        )
        for length, width in shapes
    ]  # fmt: skip
    return tuple(dict.fromkeys(found))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch, with shardings."""
    shape = (config.train.batch_size, config.train.sequence_length)
    kinds = {"loss_weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh)) for name, kind in kinds.items()}


def compile_step(program: Program, config: Config) -> Any:
    """Compiles the step. Raises jax.errors.JaxRuntimeError when the compiler finds that it does not fit (TPUs)."""
    return program.step.lower(program.state, abstract_batch(config, program.mesh), program.frozen).compile()


def memory_bytes(compiled: Any) -> int:
    """Bytes of memory that a compiled program uses on each device, by the compiler's analysis."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
