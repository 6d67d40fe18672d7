"""Checkpoints of before a model's parameters were a part of their own are read as those of now.

`data/flat` is one that was saved then: of PPO with Muon, with a critic and its head, random numbers in every leaf, and
the same leaves in `leaves.npz`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from smallcoder_jax import optim, run
from smallcoder_jax.config import Config, MeshConfig, build
from smallcoder_jax.mesh import make_mesh, parameter_name, path_name
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.report.run_folder import compare_identity
from smallcoder_jax.train import checkpoint, layouts
from smallcoder_jax.train.checkpoint import Checkpointer
from smallcoder_jax.train.state import init_state, state_sharding
from tests.train.test_loop import changed, config_of
from tests.train.test_loop import root as root

pytestmark = pytest.mark.usefixtures("standard_promotion")

FLAT = Path(__file__).parent / "data" / "flat"


def flat_config() -> Config:
    return build(json.loads((FLAT / "3" / "meta.json").read_text())["config"])


def abstract_state(config: Config) -> Any:
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps, DECODER.muon)
    shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    shardings = state_sharding(make_mesh(MeshConfig(), config.model, 8, jax.devices()[:1]), shapes, DECODER.sharding)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def test_every_leaf_of_a_stored_flat_checkpoint_comes_to_its_place() -> None:
    restored = Checkpointer(FLAT, keep=9).restore(3, abstract_state(flat_config()))
    assert restored.state.params.keys() == {"model", "critic"}
    assert restored.state.params["critic"].keys() == {"model", "head"}
    with np.load(FLAT / "leaves.npz") as expected:
        found = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)}
        assert found.keys() == set(expected.files)
        for name, leaf in found.items():
            np.testing.assert_array_equal(np.asarray(leaf), expected[name], err_msg=name)


def test_the_parameters_alone_of_a_flat_checkpoint() -> None:
    params, _ = checkpoint.load_params(FLAT / "3", abstract_state(flat_config()).params)
    with np.load(FLAT / "leaves.npz") as expected:
        kernel = params["critic"]["model"]["blocks"][1]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(kernel, expected["params/critic/blocks/1/mlp/up/kernel"])


def as_flat(saved: Path, meta: dict[str, Any], state: Any) -> None:
    """Puts the step that was saved into the form in which it would have been saved before, identity included."""
    shutil.rmtree(saved / "state")
    rest = {name: value for name, value in state._asdict().items() if name != "params"}
    trees = {name: layouts.flattened(tree) for name, tree in {"params": state.params, "rest": rest}.items()}
    ocp.save_checkpointables(str(saved / "state"), trees)
    del meta["identity"]["model"]["family"], meta["config"]["model"]["family"]
    (saved / "meta.json").write_text(json.dumps({**meta, "leaves": checkpoint.leaves_of(trees["params"])}))
    manifest = {"format": 1, "files": checkpoint.checksums(saved)}
    (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_run_of_before_goes_on_to_the_last_bit(optimizer: str, root: Path, tmp_path: Path) -> None:
    config = changed(changed(config_of(root), "optimizer", name=optimizer), "train", steps=3)
    run.train(config, tmp_path / "whole")
    saved = tmp_path / "old" / "checkpoints" / "2"
    saved.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "2", saved)
    abstract = abstract_state(config)
    restored = Checkpointer(saved.parent, keep=9).restore(2, abstract)
    as_flat(saved, restored.meta, restored.state)
    names = json.loads((saved / "meta.json").read_text())["leaves"]
    assert layouts.is_flat(names)
    assert "embed/embedding" in names
    assert run.train(config, tmp_path / "old").step == 3
    ends = [Checkpointer(tmp_path / name / "checkpoints", keep=9).restore(3, abstract) for name in ("whole", "old")]
    first, second = (jax.tree_util.tree_leaves_with_path(end.state) for end in ends)
    for (path, leaf), (_, other) in zip(first, second, strict=True):
        assert (np.asarray(leaf) == np.asarray(other)).all(), path_name(path)


def test_another_family_is_another_run() -> None:
    recorded = {"model": {"width": 8, "layers": 2}}
    now = {"model": {"family": "decoder", "width": 8, "layers": 2}}
    assert compare_identity(recorded, now) == compare_identity(now, recorded) == []
    assert compare_identity(recorded, recorded) == []
    moved = {"data": {"judge": "5a", "rl": {"reward_model": "runs/reward"}}}
    assert compare_identity(moved, {"data": {"judge": "5a"}}) == []
    other = {"model": {**now["model"], "family": "another"}}
    assert compare_identity(recorded, other) == ["model.family: the run has 'decoder', now 'another'"]


def test_adapters_alone_are_the_same_in_both() -> None:
    adapters = {"lora": {"blocks": {0: {"mlp": {"up": {"kernel": {"a": 1.0, "b": 2.0}}}}}}}
    assert layouts.flattened(adapters) == adapters
