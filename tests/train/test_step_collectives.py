"""The compiled step sends what the plan of its mesh says and nothing else, on eight pretended devices.

The plan: over `fsdp`, each piece of a matrix is gathered where the whole is needed; over the axes that split the batch,
gradients and scalars are summed; over `context`, keys, values and where they stand are gathered, and their gradients
summed and split; over `tensor`, what belongs to a device's own tokens is summed. CPU's compiler has no
reduce-scatter: it reduces a gradient and slices it, so that here the whole gradient is what a device puts in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smallcoder_jax import mesh as mesh_module
from smallcoder_jax.config import Config, MeshConfig, TrainConfig
from smallcoder_jax.mesh import parameter_name
from smallcoder_jax.models import families
from smallcoder_jax.models.decoder import model as decoder
from smallcoder_jax.models.decoder import sharding
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.preflight.collectives import KINDS, Message, messages
from smallcoder_jax.stages.shared.next_token import make_loss
from smallcoder_jax.train.program import Program, compile_step, make_program
from tests.helpers import FLOAT32, tiny_config, tiny_model
from tests.train.test_step import MESHES as EQUAL_ON

pytestmark = pytest.mark.usefixtures("standard_promotion")

LENGTH = 40  # of a row: no parameter has a dimension of this size
MODEL = tiny_model(vocab_size=128)
BATCH_AXES = {"data", "fsdp", "context"}
MESHES = {**EQUAL_ON, "context and tensor": (MeshConfig(data=1, fsdp=2, context=2, tensor=2), 8)}


class Sent(NamedTuple):
    """Collectives and the axes that each runs over, with the step that they are of."""

    program: Program
    messages: list[tuple[Message, set[str]]]


def config_of(mesh: MeshConfig, layers: str) -> Config:
    train = TrainConfig(steps=10, batch_size=8, sequence_length=LENGTH)
    return tiny_config(model=MODEL, mesh=mesh, train=train, compute=dataclasses.replace(FLOAT32, layers=layers))


def compile_and_read(name: str, layers: str) -> Sent:
    mesh, devices = MESHES[name]
    config = config_of(mesh, layers)
    program = make_program(config, make_loss(config), jax.devices()[:devices])
    unknown: set[str] = set()
    found = list(messages(compile_step(program, config).as_text(), devices, unknown))
    assert not unknown
    return Sent(program, [(message, axes_of(message.group, program.mesh)) for message in found])


sent_on = functools.cache(compile_and_read)


def axes_of(group: tuple[int, ...], mesh: Mesh) -> set[str]:
    """Along which axes the members of a group differ."""
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    return {axis for axis, place in zip(mesh.axis_names, places, strict=True) if len(set(place.tolist())) > 1}


def long_sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size > 1)


def matrices_and_vectors(program: Program, *, gathered: bool) -> set[tuple[int, ...]]:
    """The shapes that a device holds of one layer's parameters; `gathered`: once they are gathered over fsdp."""
    shapes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.params):
        spec = [None if gathered and axis == "fsdp" else axis for axis in leaf.sharding.spec]
        shape = NamedSharding(program.mesh, PartitionSpec(*spec)).shard_shape(leaf.shape)
        stacked = parameter_name(path).startswith("blocks/") and leaf.shape[0] == MODEL.layers
        shapes.add(long_sides(shape[1:] if stacked else shape))
        shapes.add(long_sides(shape))
    return shapes


def not_planned(sent: Sent) -> list[str]:
    """What is sent and not in the plan, in words."""
    sizes = sent.program.mesh.shape
    rows, length, heads = 8 // mesh_module.row_devices(sizes), LENGTH // sizes["context"], (2 // sizes["tensor"], 16)
    pieces = matrices_and_vectors(sent.program, gathered=False)
    wholes = matrices_and_vectors(sent.program, gathered=True)
    tokens = {(rows, length), (rows * length,)}  # of a device
    activations = {long_sides((*shape, *width)) for shape in tokens for width in ((), (MODEL.width,))}
    wrong = []
    for message, axes in sent.messages:
        if message.kind == "all-gather":
            allowed = pieces if axes == {"fsdp"} else set()
            if axes == {"context"}:
                allowed = {long_sides((rows, length, *heads)), long_sides((rows, length))}
        elif message.kind in ("all-reduce", "reduce-scatter"):
            allowed: set[tuple[int, ...]] = {()}
            if axes <= BATCH_AXES:
                allowed |= wholes | pieces
            elif axes == {"tensor"}:
                allowed |= activations
            if axes == {"context"} and message.kind == "reduce-scatter":
                allowed.add(long_sides((rows, LENGTH, *heads)))
        else:
            allowed = set()
        shapes = {long_sides(shape) for shape in message.shapes} - allowed
        wrong += [f"{message.kind} of {shape} over {sorted(axes)}" for shape in shapes]
    return wrong


def total(sent: Sent, kinds: set[str]) -> float:
    """Float32 numbers that a device puts into collectives of these kinds, in one step."""
    return sum(message.times * message.operand for message, _ in sent.messages if message.kind in kinds) / 4


def size_of(program: Program, least_dimensions: int) -> int:
    """Numbers in the parameters that have so many dimensions in one layer."""
    leaves = jax.tree_util.tree_leaves_with_path(program.state.params)
    matrix = ("kernel", "embedding")
    return sum(
        math.prod(leaf.shape) for path, leaf in leaves if least_dimensions < 2 or parameter_name(path).endswith(matrix)
    )


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("name", MESHES)
def test_nothing_is_sent_that_is_not_planned(name: str, layers: str) -> None:
    sent = sent_on(name, layers)
    assert not_planned(sent) == []
    assert (name == "one") == (not sent.messages)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("name", ["data", "fsdp"])
def test_each_gradient_is_summed_once(name: str, layers: str) -> None:
    sent = sent_on(name, layers)
    parameters, table = size_of(sent.program, 1), MODEL.vocab_size * MODEL.width
    # The tied table's gradient has two parts, which may be summed apart. Scalars: losses, and a norm of each gradient.
    assert parameters <= total(sent, {"all-reduce", "reduce-scatter"}) <= parameters + table + 64


@pytest.mark.parametrize("name", ["fsdp", "all", "context and tensor"])
def test_each_matrix_is_gathered_for_the_forward_pass_and_at_most_again_for_the_backward(name: str) -> None:
    sent = sent_on(name, "scan")
    sizes = sent.program.mesh.shape
    piece = size_of(sent.program, 2) / (sizes["fsdp"] * sizes["tensor"])
    gathered = [message for message, axes in sent.messages if message.kind == "all-gather" and axes == {"fsdp"}]
    assert piece <= sum(message.times * message.operand for message in gathered) / 4 <= 2 * piece


def test_only_keys_are_gathered_along_a_row_once_in_a_layer() -> None:
    sent = sent_on("context", "scan")
    found = [(message, axes) for message, axes in sent.messages if axes == {"context"}]
    keys = 4 * LENGTH // 4 * MODEL.kv_heads * MODEL.head_size  # of a device: four rows over four devices each
    sizes = {kind: sum(m.times * m.operand / 4 for m, _ in found if m.kind == kind) for kind in KINDS}
    ids = 2 * 4 * LENGTH // 4  # positions and segments; the scan over the layers has them gathered once
    assert sizes["all-gather"] == MODEL.layers * 2 * keys + ids
    assert sizes["reduce-scatter"] == MODEL.layers * 2 * keys * 4


def test_the_optimizer_is_not_replicated() -> None:
    program = sent_on("fsdp", "scan").program
    moments = [leaf for leaf in jax.tree.leaves(program.state.optimizer) if leaf.size > MODEL.layers * MODEL.width]
    assert len(moments) == 2 * 8  # of the table, and of seven matrices of the blocks
    assert all(8 * math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size for leaf in moments)


def test_without_a_word_on_activations_the_plan_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "split_activations", lambda x: x)
    wrong = not_planned(compile_and_read("fsdp", "scan"))
    assert any(f"({LENGTH}," in words or f", {LENGTH}" in words for words in wrong)


@pytest.mark.parametrize(
    ("pattern", "spec"),
    [
        (r".*(output|down)/kernel", PartitionSpec("fsdp", "tensor")),
        (r".*(query|key|value|gate|up)/kernel", PartitionSpec("tensor", "fsdp")),
    ],
)
def test_a_wrong_rule_shows(pattern: str, spec: PartitionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tuple((each, spec if each == pattern else right) for each, right in sharding.RULES)
    assert rules != sharding.RULES
    monkeypatch.setitem(families.FAMILIES, "decoder", dataclasses.replace(DECODER, sharding=rules))
    assert not_planned(compile_and_read("all", "scan"))
