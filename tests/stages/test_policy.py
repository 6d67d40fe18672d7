"""PPO and GRPO in the loop, on a tiny model: the ratio, a reward that rises, and a run that is continued."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.base.terminal import Terminal
from smallcoder_jax.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    RLConfig,
    StageConfig,
    TrainConfig,
)
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import init_head
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.rl.rollouts import Answer, Question
from smallcoder_jax.stages import grpo, ppo
from smallcoder_jax.stages.shared import policy
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.train.loop import Outcome, Trainer
from tests.helpers import FLOAT32, max_difference, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

STAGES: dict[str, Any] = {"ppo": ppo, "grpo": grpo}
ANSWERS, INNER = 32, 2
STEPS_OF_ITERATION = 4


def config_of(stage: Any, steps: int, **rl: Any) -> Config:
    return tiny_config(
        stage=StageConfig(name=stage, start="somewhere"),
        model=tiny_model(vocab_size=256, width=32, mlp_width=48, layers=1, heads=2, kv_heads=1, context=32),
        train=TrainConfig(steps=steps, batch_size=16, sequence_length=16, microbatch_size=8, log_every=1, seed=3),
        optimizer=OptimizerConfig(
            learning_rate=2e-2, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.5
        ),
        eval=EvalConfig(every=0, batches=0, sample_tokens=4),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        log=LogConfig(tensorboard=False, charts_every=0),
        rl=RLConfig(**{"questions": 8, "group_size": 4, "answer_tokens": 8, "inner_epochs": INNER, **rl}),
    )


def questions(first: int, count: int) -> list[Question]:
    return [Question((254, *f"{'x' * (number % 4)}{number}".encode())) for number in range(first, first + count)]


def share_of_low_ids(answers: Sequence[Answer]) -> np.ndarray:
    return np.array([np.mean([i < 64 for i in answer.token_ids]) for answer in answers], np.float32)


@pytest.fixture(autouse=True)
def simple_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"train": questions(0, 12), "validation": questions(100, 12)}
    monkeypatch.setattr(policy, "_ask", lambda config, tokenizer, side: sides[side])
    monkeypatch.setattr(policy, "_make_reward", lambda config, tokenizer: (share_of_low_ids, "low ids"))


def loaded_of(config: Config) -> LoadedModel:
    params = build.init_params(config.model, FLOAT32, jax.random.key(9))
    origin = {"path": "somewhere", "step": 0, "hash": "0"}
    return LoadedModel(config.model, FLOAT32, params, ByteTokenizer(), Path("somewhere"), {}, origin)


def run(config: Config, path: Path) -> tuple[Trainer, Outcome, list[dict[str, float]]]:
    with RunFolder(path).locked(), io.StringIO() as output:
        task = STAGES[config.stage.name].make_task(config, loaded_of(config), Progress(output))
        trainer = Trainer(config, RunFolder(path), task, Terminal(output, total_steps=config.train.steps, log_every=1))
        outcome = trainer.run()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return trainer, outcome, [line for line in lines if "ratio" in line]


@pytest.mark.parametrize("stage", [pytest.param("ppo", marks=pytest.mark.slow), "grpo"])
def test_the_reward_rises_and_the_policy_stays_near_its_start(stage: str, tmp_path: Path) -> None:
    price = {"ppo": 0.05, "grpo": 0.3}[stage]  # of a token in the reward; of the mean over tokens in the loss
    _, outcome, steps = run(config_of(stage, 12 * STEPS_OF_ITERATION, kl_coefficient=price), tmp_path)
    rewards = [line["reward"] for line in steps[::STEPS_OF_ITERATION]]
    assert len(rewards) == 12
    assert rewards[0] < 0.4
    assert rewards[-1] > rewards[0] + 0.2
    assert outcome.evaluation["reward"] > rewards[0] + 0.2
    assert outcome.evaluation["loss"] == -outcome.evaluation["reward"]
    # Answers of low ids alone, each as likely as at the start, would be 8 ln(1 / rewards[0]), about 12, nats away.
    assert max(line["start_kl"] for line in steps) < 8.0
    first = steps[0]
    assert first["start_kl"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < first["answer_tokens"] <= 8


@pytest.mark.parametrize("stage", STAGES)
def test_the_ratio_is_one_until_the_policy_has_learned(stage: str, tmp_path: Path) -> None:
    _, _, steps = run(config_of(stage, STEPS_OF_ITERATION + 1), tmp_path)
    assert 0 <= steps[0]["ended"] <= 1
    assert stage == "ppo" or 0 <= steps[0]["alike_groups"] < 1
    assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    for line in steps[STEPS_OF_ITERATION // INNER : STEPS_OF_ITERATION]:  # the second inner epoch
        assert line["kl"] > 1e-3
        assert line["ratio"] != pytest.approx(1.0, abs=1e-4)
    assert steps[STEPS_OF_ITERATION]["ratio"] == pytest.approx(1.0, abs=1e-5)  # new answers
    assert steps[STEPS_OF_ITERATION]["start_kl"] > 1e-3


@pytest.mark.parametrize("stage", [pytest.param("ppo", marks=pytest.mark.slow), "grpo"])
def test_a_run_continues_in_the_middle_of_an_inner_epoch_to_the_bit(stage: str, tmp_path: Path) -> None:
    end, middle = 2 * STEPS_OF_ITERATION + 1, STEPS_OF_ITERATION + 1
    straight, outcome, steps = run(config_of(stage, end, kl_target=0.1), tmp_path / "straight")
    _, _, before = run(config_of(stage, middle, kl_target=0.1), tmp_path / "stopped")
    continued, again, after = run(config_of(stage, end, kl_target=0.1), tmp_path / "stopped")
    assert len(before) == middle
    assert len(after) == len(steps) == end
    assert max_difference(straight.state.params, continued.state.params) == 0.0
    assert outcome.evaluation == again.evaluation
    for one, other in zip(steps, after, strict=True):
        for name in ("loss", "ratio", "kl", "reward", "kl_coefficient", "grad_norm"):
            assert one[name] == other[name], name
    coefficients = {round(line["kl_coefficient"], 5) for line in steps}
    assert coefficients == {0.02, 0.0196, 0.01999}


def test_ppo_trains_values_beside_the_decoder(tmp_path: Path) -> None:
    config = config_of("ppo", 6 * STEPS_OF_ITERATION, entropy_weight=0.0)
    trainer, _, steps = run(config, tmp_path)
    first = steps[0]
    # Of whole iterations: one batch differs from the next by more than processors round.
    earlier, later = (
        np.mean([line["value_loss"] for line in part])
        for part in (steps[:STEPS_OF_ITERATION], steps[-STEPS_OF_ITERATION:])
    )
    assert later < 0.5 * earlier
    assert trainer.state.params["critic"]["head"]["bias"][0] != 0
    assert first["entropy"] == pytest.approx(np.log(256), abs=0.3)
    assert set(trainer.state.params) == {"model", "critic"}


@pytest.mark.parametrize("layers", ["unroll", pytest.param("scan", marks=pytest.mark.slow)])
def test_a_critic_begins_as_the_reward_model(layers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of("ppo", 1, reward_model="judge")
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, layers=layers))
    judge = dataclasses.replace(
        loaded_of(config),
        params=build.init_params(config.model, FLOAT32, jax.random.key(7)),
        head=init_head(config.model.width, jax.random.key(8)),
    )
    monkeypatch.setattr(ppo.loading, "load", lambda path: judge)
    loaded = loaded_of(config)
    with RunFolder(tmp_path).locked(), io.StringIO() as output:
        task = ppo.make_task(config, loaded, Progress(output))
        assert "reward_model" not in task.identity["rl"]  # a run may move with the models that it learned from
        trainer = Trainer(config, RunFolder(tmp_path), task, Terminal(output, total_steps=1, log_every=1))
        params = trainer.state.params
        expected = {"model": build.to_layout(judge.params, config.compute), "head": judge.head}
        assert max_difference(params["critic"], expected) == 0.0
        assert max_difference(build.model_params(params), build.to_layout(loaded.params, config.compute)) == 0.0
        assert trainer.run().step == 1
    wider = dataclasses.replace(config.model, mlp_width=64)
    monkeypatch.setattr(ppo.loading, "load", lambda path: dataclasses.replace(judge, model=wider))
    with pytest.raises(UserError, match=r"model in judge has another shape.*mlp_width: 64 there, 48 here"):
        ppo.make_task(config, loaded, Progress(io.StringIO()))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_split_parameters_learn_the_same(optimizer: Any, tmp_path: Path) -> None:
    """Those of the critic as well, by either optimizer: of its matrices Muon is the one."""
    config = config_of("ppo", 2)
    changed = dataclasses.replace(config.optimizer, name=optimizer, muon_learning_rate=0.01)
    config = dataclasses.replace(config, optimizer=changed)
    found = {}
    for name, mesh in {"whole": MeshConfig(), "split": MeshConfig(data=2, fsdp=4)}.items():
        trainer, _, _ = run(dataclasses.replace(config, mesh=mesh), tmp_path / name)
        found[name] = trainer.state.params
    kernel = found["split"]["critic"]["model"]["blocks"][0]["mlp"]["down"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert max_difference(found["whole"], found["split"]) < 1e-5
    first = build.init_params(config.model, FLOAT32, jax.random.key(9))
    moved = np.abs(jax.device_get(kernel) - jax.device_get(first["blocks"][0]["mlp"]["down"]["kernel"])).max()
    assert moved > 1e-3


@pytest.mark.slow
def test_an_entropy_bonus_keeps_the_policy_undecided(tmp_path: Path) -> None:
    kept, lost = (
        run(config_of("ppo", 6 * STEPS_OF_ITERATION, entropy_weight=weight), tmp_path / str(weight))[2][-1]["entropy"]
        for weight in (0.3, 0.0)
    )
    assert kept > lost + 0.1


@pytest.mark.slow
def test_a_larger_price_keeps_the_policy_nearer_to_its_start(tmp_path: Path) -> None:
    for stage in STAGES:
        dear, cheap = (
            run(config_of(stage, 6 * STEPS_OF_ITERATION, kl_coefficient=price), tmp_path / f"{stage}{price}")[1]
            for price in (1.0, 0.0)
        )
        assert dear.evaluation["start_kl"] < 0.5 * cheap.evaluation["start_kl"]


def test_what_a_policy_is_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("grpo", 1)
    loaded = loaded_of(config)
    monkeypatch.setattr(policy, "load_start", lambda config: None)
    found = grpo.measure(config, loaded, Progress(io.StringIO()))
    assert found.keys() == {"loss", "reward", "answer_tokens", "ended"}
    assert 0 < found["reward"] < 1
    other = dataclasses.replace(loaded, params=build.init_params(config.model, FLOAT32, jax.random.key(1)))
    monkeypatch.setattr(policy, "load_start", lambda config: other)
    away = ppo.measure(config, loaded, Progress(io.StringIO()))
    assert away["reward"] == found["reward"]
    assert away["start_kl"] > 0.1
    started = grpo.measure(config, other, Progress(io.StringIO()))
    assert started["gain"] == 0.0
    assert away["gain"] == pytest.approx(away["reward"] - started["reward"], abs=1e-6)
    config = dataclasses.replace(config, eval=EvalConfig(batches=1, batch_size=1))
    alone = ppo.measure(config, loaded, Progress(io.StringIO()))
    assert "gain_error" not in alone  # of one prompt nobody knows it
    assert np.isfinite(list(alone.values())).all()


def test_the_standard_error_is_that_of_the_mean_over_questions() -> None:
    gains = np.array([1.0, 2.0, 4.0, -1.0, 0.5], np.float32)
    batch = {name: np.zeros((6, 1), np.float32) for name in ("reward", "start_kl", "answer_tokens", "ended")}
    batch["gain"] = np.append(gains, 9.0)[:, None]
    batch["counted"] = np.array([1, 1, 1, 1, 1, 0], np.float32)[:, None]
    found = policy.summarise(policy.evaluation_sums(batch))
    assert found["gain"] == pytest.approx(gains.mean())
    assert found["gain_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(5), rel=1e-5)


def test_a_policy_has_a_start_and_whole_rows() -> None:
    config = config_of("ppo", 1)
    with pytest.raises(UserError, match="starts from an existing model"):
        ppo.make_task(config, None, Progress(io.StringIO()))
    split = dataclasses.replace(config, mesh=MeshConfig(data=4, context=2))
    with pytest.raises(UserError, match="cannot split rows"):
        ppo.make_task(split, loaded_of(split), Progress(io.StringIO()))


def test_a_head_of_the_stage_before_is_left_behind(tmp_path: Path) -> None:
    config = config_of("grpo", 1)
    with_head = dataclasses.replace(loaded_of(config), head=init_head(config.model.width, jax.random.key(1)))
    with RunFolder(tmp_path).locked(), io.StringIO() as output:
        task = grpo.make_task(config, with_head, Progress(output))
        trainer = Trainer(config, RunFolder(tmp_path), task, Terminal(output, total_steps=1, log_every=1))
        assert "head" not in trainer.state.params
        assert trainer.run().step == 1
