"""Distillation: the loss by its definition, whatever the padding; a frozen teacher; resumed exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax import loading
from smallcoder_jax.config import Config, DistillConfig
from smallcoder_jax.errors import UserError
from smallcoder_jax.models import build
from smallcoder_jax.stages import distill, run
from smallcoder_jax.train.log_files import read_csv
from tests.helpers import FLOAT32, packed_batch, tiny_config, tiny_model
from tests.stages.pairs import assert_resumes, config_of, make_root

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("distill"))


def config_with(root: Path, **changes: Any) -> Config:
    config = config_of(root, "distill", distill=DistillConfig(teacher=str(root / "start"), **changes))
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, start=""))


def mean_loss(batch: dict[str, np.ndarray], alpha: float = 0.5) -> tuple[float, dict[str, float]]:
    student, teacher = tiny_model(), tiny_model(width=32, layers=1)
    config = tiny_config(model=student, distill=DistillConfig(teacher="x", alpha=alpha, temperature=2.0))
    params = {
        **build.init_params(student, FLOAT32, jax.random.key(0)),
        "teacher": build.init_params(teacher, FLOAT32, jax.random.key(1)),
    }
    loss, weight, sums = jax.jit(
        lambda params, batch: distill.make_loss(config, teacher, FLOAT32)(params, batch, None)
    )(params, jax.tree.map(jnp.asarray, batch))
    return float(loss / weight), {name: float(value / weight) for name, value in sums.items()}


def test_the_loss_does_not_change_with_length_or_padding() -> None:
    batch = packed_batch(tiny_model(), 4, 32, seed=0)
    found, sums = mean_loss(batch)
    padded = {name: np.pad(values, ((0, 2), (0, 16))) for name, values in batch.items()}
    assert mean_loss(padded)[0] == pytest.approx(found, rel=1e-5)
    assert found == pytest.approx(0.5 * sums["nats"] + 0.5 * 4.0 * sums["kl"], rel=1e-5)
    assert sums["kl"] > 1e-3
    assert mean_loss(batch, alpha=1.0)[0] == pytest.approx(sums["nats"], rel=1e-5)


def test_the_teacher_is_not_trained_and_the_student_comes_near_to_it(root: Path, tmp_path: Path) -> None:
    config = config_with(root, alpha=0.0)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=30))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=5))
    run.train(config, tmp_path / "run")
    _, rows = read_csv(tmp_path / "run" / "eval_log.csv")
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"]
    loaded = loading.load(tmp_path / "run")
    assert set(loaded.params) == set(loading.load(root / "start").params)
    meta = (tmp_path / "run" / "checkpoints" / "best" / "meta.json").read_text()
    assert "teacher/" not in meta  # a student's checkpoint holds the student


def test_a_resume_is_exact(root: Path, tmp_path: Path) -> None:
    assert_resumes(root, config_with(root), tmp_path)


def test_a_student_of_its_own_teacher_has_nothing_to_learn_from_it(root: Path, tmp_path: Path) -> None:
    config = config_with(root, alpha=0.0)
    config = dataclasses.replace(
        config,
        stage=dataclasses.replace(config.stage, start=str(root / "start")),
        train=dataclasses.replace(config.train, steps=0),
    )
    found = run.train(config, tmp_path / "run").evaluation
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_is_needed(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "distill")
    with pytest.raises(UserError, match=r"needs --config\.distill\.teacher"):
        run.train(config, tmp_path / "run")
    config = dataclasses.replace(config_with(root), distill=DistillConfig(teacher=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="does not exist"):
        run.train(config, tmp_path / "run")
