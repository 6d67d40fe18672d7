"""Distillation: the loss by its definition, whatever the padding; a frozen teacher; resumed exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax import loading, run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, DistillConfig, MeshConfig, validate
from smallcoder_jax.models import build
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.stages import distill
from smallcoder_jax.stages.shared import teacher_tokens
from tests.helpers import FLOAT32, packed_batch, tiny_config, tiny_model
from tests.stages.pairs import LENGTH, assert_resumes, config_of, make_root

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
        "model": build.init_params(student, FLOAT32, jax.random.key(0)),
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
        train=dataclasses.replace(config.train, steps=1),
    )
    run.train(config, tmp_path / "run")
    first = read_csv(tmp_path / "run" / "eval_log.csv")[1][0]
    assert first["step"] == 0
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)


def teacher_files(root: Path) -> dict[str, float]:
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns for path in (root / "data" / "teachers").rglob("*.npz")
    }


@pytest.mark.slow
def test_kept_tokens_of_the_whole_vocabulary_teach_what_the_teacher_does(root: Path, tmp_path: Path) -> None:
    runs = {}
    for name, top_k in (("beside", 0), ("kept", 256)):
        result = run.train(config_with(root, top_k=top_k), tmp_path / name)
        runs[name] = result.evaluation, loading.load(tmp_path / name).params
    for name, value in runs["beside"][0].items():
        assert runs["kept"][0][name] == pytest.approx(value, rel=1e-4), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), runs["beside"][1], runs["kept"][1])
    config = dataclasses.replace(config_with(root, top_k=256), eval=config_with(root).eval)
    meta = json.loads((tmp_path / "kept" / "checkpoints" / "best" / "meta.json").read_text())
    step_folder = (tmp_path / "kept" / "checkpoints" / "best").resolve()
    assert run.reevaluate(config, step_folder, meta) == pytest.approx(runs["kept"][0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_resume_with_kept_tokens_is_exact(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_tokens, "FILE_BYTES", 3 * 16 * LENGTH * 8 * 8)  # three batches a file
    assert_resumes(root, config_with(root, top_k=8), tmp_path)


@pytest.mark.slow
def test_kept_tokens_are_made_once_and_added_to(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_tokens, "FILE_BYTES", 2 * 16 * LENGTH * 4 * 8)  # two batches a file
    config = config_with(root, top_k=4)
    before = set(teacher_files(root))

    def trained(name: str, steps: int, **changes: Any) -> dict[str, float]:
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps), **changes)
        run.train(changed, tmp_path / name)
        return {path: time for path, time in teacher_files(root).items() if path not in before and "/train/" in path}

    first = trained("one", 3)
    assert sorted(Path(path).name for path in first) == ["00000000-00000002.npz", "00000002-00000003.npz"]
    distill = dataclasses.replace(config.distill, alpha=0.1)
    assert trained("two", 3, distill=distill) == first
    assert trained("shorter", 1) == first
    more = trained("more", 6)
    assert sorted(Path(path).name for path in more) == [
        "00000000-00000002.npz", "00000002-00000004.npz", "00000004-00000006.npz"
    ]  # fmt: skip
    assert {path: time for path, time in more.items() if path in first} == {
        path: time for path, time in first.items() if path in more
    }
    distill = dataclasses.replace(config.distill, temperature=3.0)
    assert len(trained("another", 3, distill=distill)) == 5


@pytest.mark.slow
def test_damaged_kept_tokens_are_named(root: Path, tmp_path: Path) -> None:
    config = config_with(root, top_k=5)
    before = set(teacher_files(root))
    run.train(config, tmp_path / "run")
    (name,) = (name for name in set(teacher_files(root)) - before if "/train/" in name)
    path = root / name
    whole = path.read_bytes()
    for place in (len(whole) // 2, len(whole) // 4):  # in the log-probabilities, in the ids
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{path.name} is damaged.*delete it"):
            run.train(config, tmp_path / f"again-{place}")
    path.unlink()
    run.train(config, tmp_path / "new")
    assert path.read_bytes() == whole


def test_kept_tokens_want_whole_rows(root: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_with(root, top_k=4), mesh=MeshConfig(data=-1, context=2))
    with pytest.raises(UserError, match=r"distill\.top_k needs whole rows"):
        run.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"at most model\.vocab_size=256"):
        validate(config_with(root, top_k=257))


def test_a_teacher_is_needed(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "distill")
    with pytest.raises(UserError, match=r"needs --config\.distill\.teacher"):
        run.train(config, tmp_path / "run")
    config = dataclasses.replace(config_with(root), distill=DistillConfig(teacher=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="does not exist"):
        run.train(config, tmp_path / "run")


def test_a_teacher_with_other_spare_rows(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loading.load(root / "start")
    wider = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, vocab_size=264))
    monkeypatch.setattr(loading, "load", lambda path: wider)
    with pytest.raises(UserError, match=r"has a table of 264 rows, but config\.model\.vocab_size=256"):
        run.train(config_with(root), tmp_path / "run")
