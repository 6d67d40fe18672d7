"""The training step: accumulation and meshes change nothing but rounding, it compiles once and donates its state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smallcoder_jax import optim
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, MeshConfig, OptimizerConfig, TrainConfig
from smallcoder_jax.mesh import batch_sharding, make_mesh, path_name, place_batch, process_rows, spec_of
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.stages.shared import next_token
from smallcoder_jax.train.program import compile_step, make_program
from smallcoder_jax.train.state import TrainState, init_state, state_sharding
from smallcoder_jax.train.step import make_eval_step, make_train_step
from tests.helpers import CAPTURES, FLOAT32, max_difference, packed_batch, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

# A large eps: Adam's first step divides a gradient by its own size, which would blow up rounding in entries near 0.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.1, eps=1e-3)
MESHES = {
    "one": (MeshConfig(), 1),
    "data": (MeshConfig(data=8), 8),
    "fsdp": (MeshConfig(data=1, fsdp=8), 8),
    "all": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "context": (MeshConfig(data=1, fsdp=2, context=4), 8),
    "context and tensor": (MeshConfig(data=1, context=4, tensor=2), 8),
}


class Setup(NamedTuple):
    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batch: dict[str, jax.Array]
    shardings: TrainState


def config_for(**train: Any) -> Config:
    changes = {"steps": 10, "batch_size": 8, "sequence_length": 32, "seed": 3, **train}
    return tiny_config(
        model=tiny_model(vocab_size=128),
        compute=dataclasses.replace(FLOAT32, layers="scan"),  # compiles faster
        train=TrainConfig(**changes),
        optimizer=OPTIMIZER,
    )


@functools.cache
def initial_state(config: Config) -> TrainState:
    """On the host. The number of rows plays no part in it: `config` should be the same one for all."""
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps, DECODER.muon)
    return jax.device_get(jax.jit(lambda: init_state(config, optimizer))())


def uneven_batch(config: Config) -> dict[str, np.ndarray]:
    """Rows of which some carry almost no weight, and one none: means of means would go wrong."""
    batch = packed_batch(config.model, config.train.batch_size, config.train.sequence_length, seed=1)
    for row, kept in enumerate((0, 1, 3)):
        batch["loss_weights"][row, kept:] = 0.0
    return batch


def set_up(config: Config, mesh_config: MeshConfig = MESHES["one"][0], devices: int = 1) -> Setup:
    mesh = make_mesh(mesh_config, config.model, config.train.microbatch_rows, jax.devices()[:devices])
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps, DECODER.muon)
    start = initial_state(dataclasses.replace(config, train=config_for().train))
    shardings = state_sharding(mesh, start, DECODER.sharding)
    state = jax.device_put(start, shardings)
    step = make_train_step(
        next_token.make_loss(config),
        optimizer,
        optim.schedule(config.optimizer, config.train.steps),
        reported=("accuracy",),
        peak=config.optimizer.learning_rate,
        microbatches=config.train.batch_size // config.train.microbatch_rows,
        matmul="exact",
        guarding=config.guard,
        mesh=mesh,
        shardings=shardings,
        frozen_shardings={},
    )
    batch = jax.device_put(uneven_batch(config), batch_sharding(mesh))
    return Setup(state, step, batch, shardings)


def take_steps(setup: Setup, count: int) -> tuple[TrainState, list[dict[str, float]]]:
    state, seen = setup.state, []
    for _ in range(count):
        state, metrics = setup.step(state, setup.batch, {})
        seen.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), seen


@pytest.fixture(scope="module")
def reference() -> tuple[TrainState, list[dict[str, float]]]:
    """Two steps on one device, in one piece."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return take_steps(set_up(config_for()), 2)


@CAPTURES
def test_the_step_is_the_gradient_of_the_mean_over_weights(reference: tuple[Any, list[dict[str, float]]]) -> None:
    config = config_for()
    loss_fn = next_token.make_loss(config)
    batch = jax.tree.map(jnp.asarray, uneven_batch(config))
    weight = float(batch["loss_weights"].sum())

    @jax.jit
    def mean(params: Any) -> Any:
        return loss_fn(params, batch, None)[0] / weight

    loss, gradient = jax.value_and_grad(mean)(initial_state(config).params)
    _, metrics = reference
    assert metrics[0]["tokens"] == weight
    assert metrics[0]["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics[0]["grad_norm"] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-5)


@pytest.mark.parametrize("microbatch_size", [1, 4])
def test_accumulation_equals_one_batch(microbatch_size: int, reference: Any) -> None:
    state, metrics = take_steps(set_up(config_for(microbatch_size=microbatch_size)), 2)
    expected_state, expected_metrics = reference
    assert max_difference(state.params, expected_state.params) < 1e-6
    assert max_difference(state.optimizer, expected_state.optimizer) < 1e-6
    for found, expected in zip(metrics, expected_metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_schedule_counts_steps_and_not_microbatches() -> None:
    config = config_for(microbatch_size=2)
    share = optim.schedule(config.optimizer, config.train.steps)
    state, metrics = take_steps(set_up(config), 3)
    expected = [config.optimizer.learning_rate * float(share(step)) for step in range(3)]
    assert [values["learning_rate"] for values in metrics] == pytest.approx(expected)
    counts = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
    assert counts
    assert all(int(count) == 3 for count in counts)


@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [("data", 0), ("fsdp", 0), ("all", 0), ("all", 4), ("context", 0), ("context", 4), ("context and tensor", 0)],
)
def test_a_mesh_changes_nothing_but_rounding(name: str, microbatch_size: int, reference: Any) -> None:
    expected_state, expected_metrics = reference
    state, metrics = take_steps(set_up(config_for(microbatch_size=microbatch_size), *MESHES[name]), 2)
    assert max_difference(state.params, expected_state.params) < 1e-5
    assert max_difference(state.optimizer, expected_state.optimizer) < 1e-5
    for found, expected in zip(metrics, expected_metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_documents_cross_the_borders_of_a_split_row() -> None:
    """Of the batch with which meshes are compared: else no query would need another device's keys."""
    segments = uneven_batch(config_for())["segment_ids"].reshape(8, 4, 8)
    crossing = (segments[:, :-1, -1] == segments[:, 1:, 0]) & (segments[:, 1:, 0] > 0)
    assert crossing.sum() > 8


def test_a_process_places_whole_rows_that_are_split_along_their_length() -> None:
    config = config_for()
    mesh = make_mesh(MESHES["context"][0], config.model, 8, jax.devices())
    batch = uneven_batch(config)
    placed = place_batch(batch_sharding(mesh), batch)
    assert process_rows(mesh, 8) == list(range(8))
    for name, value in placed.items():
        np.testing.assert_array_equal(value, batch[name])
        assert {shard.data.shape for shard in value.addressable_shards} == {(4, 8)}


def test_evaluation_on_a_mesh_sums_over_all_rows() -> None:
    config = config_for()
    batch = {**uneven_batch(config), "bytes": np.ones((8, 32), np.float32)}
    found = []
    for mesh_config, devices in (MESHES["one"], MESHES["all"]):
        mesh = make_mesh(mesh_config, config.model, 8, jax.devices()[:devices])
        setup = set_up(config, mesh_config, devices)
        step = make_eval_step(
            next_token.make_loss(config),
            matmul="exact",
            mesh=mesh,
            shardings=setup.shardings.params,
            frozen_shardings={},
        )
        sums = step(setup.state.params, jax.device_put(batch, batch_sharding(mesh)), {})
        found.append({name: float(value) for name, value in sums.items()})
    assert found[0]["weight"] == batch["loss_weights"].sum()
    assert found[0]["bytes"] == 8 * 32
    assert found[0]["accuracy"] <= found[0]["top5_accuracy"]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_it_compiles_once_and_donates_the_state() -> None:
    setup = set_up(config_for(microbatch_size=4))
    state = setup.state
    for _ in range(3):
        before = state
        state, _ = setup.step(before, setup.batch, {})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert setup.step._cache_size() == 1


@pytest.mark.parametrize(("optimizer", "layers"), [("adamw", "scan"), ("muon", "scan"), ("muon", "unroll")])
def test_fsdp_splits_every_matrix_and_its_moments(optimizer: str, layers: str) -> None:
    config = config_for()
    config = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, layers=layers),
        optimizer=dataclasses.replace(config.optimizer, name=optimizer),
    )
    setup = set_up(config, *MESHES["fsdp"])
    state = setup.state
    if optimizer == "adamw":  # and it stays so
        state, _ = setup.step(state, setup.batch, {})
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.optimizer)):
        if "kernel" in path_name(path) or "embedding" in path_name(path):
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, path_name(path)
            split += 1
        else:
            assert leaf.is_fully_replicated, path_name(path)
    matrices = 1 + 7 * (1 if layers == "scan" else config.model.layers)
    # The parameter and Adam's two moments; Muon's matrices have one.
    assert split == (3 * matrices if optimizer == "adamw" else 2 * matrices + 1)


def test_scanned_and_unrolled_parameters_are_split_alike() -> None:
    model = tiny_model(norm="layernorm", bias="all", mlp="gelu", positions="learned", embeddings="untied")
    unrolled = jax.eval_shape(lambda: build.init_params(model, tiny_config().compute, jax.random.key(0)))
    scanned = jax.eval_shape(build.to_scanned, unrolled)
    for path, leaf in jax.tree_util.tree_leaves_with_path(scanned):
        name = path_name(path)
        stacked = tuple(spec_of(DECODER.sharding, name, leaf.ndim))
        if name.startswith("blocks/"):
            one = tuple(spec_of(DECODER.sharding, name.replace("blocks/", "blocks/0/"), leaf.ndim - 1))
            assert stacked == ((None, *one) if one else ()), name
    with pytest.raises(KeyError, match="no sharding rule for parameter 'blocks/0/gadget/weight'"):
        spec_of(DECODER.sharding, "blocks/0/gadget/weight", 2)


@pytest.mark.parametrize(
    ("mesh", "rows", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), 8, "at most one is -1"),
        (MeshConfig(data=0), 8, "sizes are positive"),
        (MeshConfig(data=3), 8, "does not multiply to the 8 devices; set one axis to -1"),
        (MeshConfig(data=-1, fsdp=3), 8, "does not multiply to the 8 devices"),
        (MeshConfig(data=4, fsdp=2), 12, "a batch of 12 rows .* does not divide over 8 .* use a multiple of 8"),
        (MeshConfig(data=1, tensor=8), 8, r"model\.kv_heads=2 does not divide over mesh\.tensor=8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: MeshConfig, rows: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(mesh, tiny_model(), rows)


def test_a_width_or_vocabulary_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.width=60 does not divide over mesh\.fsdp=8"):
        make_mesh(MeshConfig(data=1, fsdp=8), tiny_model(width=60), 8)
    with pytest.raises(UserError, match=r"model\.vocab_size=97 does not divide over mesh\.tensor=2"):
        make_mesh(MeshConfig(data=-1, tensor=2), tiny_model(), 8)


def test_one_axis_takes_all_devices_that_are_left() -> None:
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), tiny_model(vocab_size=128), 8)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


def test_a_row_that_does_not_divide_over_context_is_refused() -> None:
    config = dataclasses.replace(config_for(sequence_length=30), mesh=MESHES["context"][0])
    with pytest.raises(UserError, match=r"train\.sequence_length=30 does not divide over mesh\.context=4"):
        make_program(config, next_token.make_loss(config))


def test_a_step_that_is_not_sound_changes_nothing_but_the_count() -> None:
    config = config_for()
    setup = set_up(config)
    poisoned = setup.batch | {"loss_weights": setup.batch["loss_weights"] * jnp.float32(jnp.nan)}
    calm, hurt = set_up(config).state, setup.state
    for batches, expected in ((setup.batch, 0.0), (poisoned, 1.0), (setup.batch, 0.0)):
        hurt, metrics = setup.step(hurt, batches, {})
        assert float(metrics["skipped"]) == expected
    for _ in range(2):
        calm, undisturbed = setup.step(calm, setup.batch, {})
    assert float(metrics["learning_rate"]) == float(undisturbed["learning_rate"])
    assert (int(hurt.step), int(calm.step), int(hurt.guard.skipped)) == (3, 2, 1)
    pairs = ((hurt.params, calm.params), (hurt.optimizer, calm.optimizer))
    jax.tree.map(np.testing.assert_array_equal, *zip(*pairs, strict=True))


def test_the_state_is_updated_in_place() -> None:
    """Gradients are the only other tree of the parameters' size: what a guard or a clip would add shows here."""
    model = tiny_model(vocab_size=128, width=256, mlp_width=1024)
    config = dataclasses.replace(
        config_for(batch_size=1, sequence_length=8), model=model, compute=dataclasses.replace(FLOAT32, layers="unroll")
    )
    program = make_program(config, next_token.make_loss(config), jax.devices()[:1])
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.state.params))
    analysis = compile_step(program, config).memory_analysis()
    assert analysis.temp_size_in_bytes < 1.3 * parameters
