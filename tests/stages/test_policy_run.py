"""The stages grpo and ppo as they are run: from a run folder, on code, judged as configured."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from smallcoder_jax import run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    PreferencesConfig,
    RLConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)
from smallcoder_jax.evaluate.verify import verify
from smallcoder_jax.loading import load
from tests.helpers import tiny_config, tiny_model

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.slow]


def config_of(root: Path, stage: Any, **changes: Any) -> Config:
    config = tiny_config(
        model=tiny_model(
            vocab_size=512, width=16, mlp_width=32, layers=1, heads=2, kv_heads=1, head_size=8, context=320
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece"),
        data=DataConfig(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2),
        train=TrainConfig(steps=2, batch_size=8, sequence_length=320, log_every=1),
        eval=EvalConfig(every=0, batches=1, sample_tokens=4),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(tensorboard=False, charts_every=0),
        stage=StageConfig(name=stage, start="" if stage in ("pretrain", "reward") else str(root / "start")),
        rl=RLConfig(prompts="code", prompt_count=500, questions=4, group_size=2, answer_tokens=16, inner_epochs=1),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy")
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    (root / "code" / "argparse.py").write_text(inspect.getsource(argparse))  # enough text for a tokenizer
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(config_of(root, "pretrain"), root / "start")
    return root


def test_grpo_with_checked_answers(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "grpo")
    outcome = run.train(config, tmp_path)
    assert outcome.step == 2
    beside_start = {"gain", "gain_error", "start_kl"}
    assert outcome.evaluation.keys() == {"loss", "reward", "answer_tokens", "ended"} | beside_start
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"ratio", "reward", "start_kl", "kl_coefficient"} < {name for line in lines for name in line}
    measured = run.evaluate_run(tmp_path, config, "2")
    assert measured["start_kl"] == pytest.approx(outcome.evaluation["start_kl"], abs=1e-4)
    assert verify(tmp_path, run.reevaluate).status == "verified"
    started = json.loads((tmp_path / "run.json").read_text())["started_from"]["path"]  # as seen from the run
    assert (tmp_path / started).resolve() == (root / "start").resolve()


def test_ppo_wants_a_reward_model_that_is_one(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "ppo")
    judged = dataclasses.replace(config, rl=dataclasses.replace(config.rl, reward_model=str(root / "start")))
    with pytest.raises(UserError, match="has no scalar head"):
        run.train(judged, tmp_path / "one")
    assert run.train(config, tmp_path / "two").step == 2
    assert load(tmp_path / "two").head is None  # what a critic expects is no judgement
    assert verify(tmp_path / "two", run.reevaluate).status == "verified"
    reward = config_of(root, "reward", preferences=PreferencesConfig(count=200))
    reward = dataclasses.replace(reward, stage=StageConfig(name="reward", start=str(root / "start")))
    assert run.train(reward, tmp_path / "judge").step == 2
    judged = dataclasses.replace(config, rl=dataclasses.replace(config.rl, reward_model=str(tmp_path / "judge")))
    assert run.train(judged, tmp_path / "three").step == 2
