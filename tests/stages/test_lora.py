"""Adapters in the stages that take them: they alone are trained, saved and continued, and all else sees one model."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from smallcoder_jax import loading, run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import (
    ComputeConfig,
    Config,
    DpoConfig,
    LoraConfig,
    RLConfig,
    StageConfig,
    from_config_dict,
    to_dict,
)
from smallcoder_jax.data.conversations.record import Record
from smallcoder_jax.data.conversations.store import Dialogs
from smallcoder_jax.evaluate.verify import verify
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.rl.rollouts import Answer, Question
from smallcoder_jax.stages import dpo, sft
from smallcoder_jax.stages.shared import next_token, policy
from smallcoder_jax.tokenizers.chat import Conversation, Message, encode
from smallcoder_jax.train import checkpoint
from smallcoder_jax.train.program import abstract_batch, make_program
from tests.helpers import max_difference
from tests.stages.pairs import assert_resumes, config_of, make_root
from tools import export

pytestmark = pytest.mark.usefixtures("standard_promotion")
RANK = 2
# Of the one block: query, key, value, output, gate, up, down.
ADAPTED = RANK * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("lora"))


def write_dialogs(folder: Path) -> Dialogs:
    """Somebody says a letter, and is answered with it three times."""
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for side, count in (("train", 64), ("validation", 16)):
        drawn = [rng.choice("abcd") for _ in range(count)]
        turns = [(Message("user", letter), Message("assistant", 3 * letter)) for letter in drawn]
        records = [Record(Conversation(pair), side, {}) for pair in turns]
        lines = [json.dumps(record.to_json()) + "\n" for record in records]
        (folder / f"{side}.jsonl").write_text("".join(lines))
    return Dialogs(folder, "0", {"train": 64, "validation": 16})


@pytest.fixture(autouse=True)
def simple_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogs = write_dialogs(root / "dialogs")
    monkeypatch.setattr(sft, "prepare", lambda config, progress: dialogs)
    numbers = {"train": range(12), "validation": range(100, 112)}
    asked = {side: [Question((254, *f"{i}".encode())) for i in of_side] for side, of_side in numbers.items()}
    monkeypatch.setattr(policy, "_ask", lambda config, tokenizer, side: asked[side])
    monkeypatch.setattr(policy, "_make_reward", lambda config, tokenizer: (share_of_low_ids, "low ids"))


def share_of_low_ids(answers: Sequence[Answer]) -> np.ndarray:
    return np.array([np.mean([i < 64 for i in answer.token_ids]) for answer in answers], np.float32)


def lora_config(root: Path, stage: Any, layers: Any, steps: int, **changes: Any) -> Config:
    config = config_of(root, stage, steps=steps, lora=LoraConfig(rank=RANK), **changes)
    return dataclasses.replace(
        config,
        compute=ComputeConfig(dtype="float32", layers=layers),
        eval=dataclasses.replace(config.eval, sample_tokens=4),
        checkpoint=dataclasses.replace(config.checkpoint, every=max(steps, 1)),
    )


def tune(root: Path, layers: str) -> Path:
    """A run of stage sft in a layout, made once."""
    folder = root / f"sft_{layers}"
    if not folder.exists():
        run.train(lora_config(root, "sft", layers, 30), folder)
    return folder


@pytest.fixture(params=["unroll", pytest.param("scan", marks=pytest.mark.slow)])
def tuned(request: pytest.FixtureRequest, root: Path, simple_data: None, standard_promotion: None) -> Path:
    del simple_data, standard_promotion  # what training needs
    return tune(root, request.param)


def test_it_begins_as_its_start_and_learns(root: Path, tuned: Path) -> None:
    start = loading.load(root / "start")
    first, last = loading.load(tuned, step=0), loading.load(tuned, step=30)
    assert max_difference(first.params, start.params) == 0.0
    _, rows = read_csv(tuned / "eval_log.csv")
    assert [row["step"] for row in rows] == [0, 30]
    # Not by much more: the embedding stays, and one that has learned next to nothing keeps probabilities alike.
    assert rows[1]["loss"] < rows[0]["loss"] - 1.2
    assert rows[0]["accuracy"] == 0
    assert rows[1]["accuracy"] > 0.5
    for name in ("embed", "final_norm"):
        assert max_difference(last.params[name], start.params[name]) == 0.0
    block, before = last.params["blocks"][0], start.params["blocks"][0]
    for name in ("attention_norm", "mlp_norm"):
        assert max_difference(block[name], before[name]) == 0.0
    for part in ("attention", "mlp"):
        for name, kernel in before[part].items():
            assert max_difference(block[part][name], kernel) > 1e-3, name
    assert json.loads((tuned / "training_info.json").read_text())["parameters"] == ADAPTED + sum(
        leaf.size for leaf in jax.tree.leaves(start.params)
    )


def test_its_samples_are_of_the_merged_model(tuned: Path) -> None:
    samples = json.loads((tuned / "text_samples.json").read_text())
    assert {sample["step"] for sample in samples} == {0, 30}
    for step in (0, 30):
        loaded = loading.load(tuned, step=step)
        options = SamplingOptions(max_tokens=4, temperature=0.7, seed=0)
        for sample in (sample for sample in samples if sample["step"] == step):
            asked = Conversation((Message("user", sample["input"]),))
            prompt = encode(asked, loaded.tokenizer, reply=True).ids.tolist()
            assert sample["output"] == loaded.generator.generate([prompt], options)[0].text


def test_a_checkpoint_holds_adapters_and_their_moments_alone(root: Path, tuned: Path) -> None:
    step = RunFolder(tuned).checkpoints / "30"
    leaves = checkpoint.read_meta(step)["leaves"]
    assert all(name.startswith("lora/blocks/") for name in leaves)
    assert sum(int(np.prod(shape)) for shape, _ in leaves.values()) == ADAPTED
    config = lora_config(root, "sft", "unroll", 30)
    program = make_program(config, next_token.make_loss(config), jax.devices()[:1])
    assert sum(leaf.size for leaf in jax.tree.leaves(program.state.optimizer) if leaf.ndim) == 2 * ADAPTED
    lowered = program.step.lower(program.state, abstract_batch(config, program.mesh), program.frozen)  # of a preflight
    assert lowered.out_info[0].params.keys() == {"lora"}
    sizes = [
        sum(file["bytes"] for file in checkpoint.checksums(folder).values())
        for folder in (step, checkpoint.find_step(RunFolder(root / "start").checkpoints, None))
    ]
    assert sizes[0] < 0.7 * sizes[1]  # at this size most of it is not numbers


def test_it_is_verified(tuned: Path) -> None:
    verdict = verify(tuned, run.reevaluate)
    assert verdict.status == "verified", verdict.reason
    assert verdict.loss == pytest.approx(verdict.recorded_loss, abs=1e-5)


@pytest.mark.slow
def test_transformers_agrees_with_it_merged(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tune(root, "scan")
    export.main(["--checkpoint", str(tuned), "--step", "30", "--output", str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["passed"]
    merged = loading.load(tuned, step=30)
    assert max_difference(loading.load(tmp_path / "out").params, merged.params) == 0.0


def test_a_start_that_is_gone_or_has_changed_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "start", tmp_path / "start", symlinks=True)
    config = lora_config(root, "sft", "unroll", 1)
    config = dataclasses.replace(config, stage=StageConfig("sft", str(tmp_path / "start")))
    run.train(config, tmp_path / "run")
    loading.load(tmp_path / "run")
    step = checkpoint.find_step(RunFolder(tmp_path / "start").checkpoints, None)
    manifest = step / checkpoint.MANIFEST
    content = manifest.read_text()
    manifest.write_text(content + "\n")
    with pytest.raises(UserError, match=r"adapters to the model in .*start, step \d, which has changed"):
        loading.load(tmp_path / "run")
    manifest.write_text(content)
    array = next(path for path in (step / "state").rglob("*") if path.is_file() and path.stat().st_size > 1000)
    data = array.read_bytes()
    array.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    with pytest.raises(UserError, match="is damaged"):
        loading.load(tmp_path / "run")
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(UserError, match=r"which is gone .* bring that model back"):
        loading.load(tmp_path / "run")


def test_dpo_learns_beside_adapters_that_were_merged(root: Path, tuned: Path, tmp_path: Path) -> None:
    layers = "scan" if tuned.name.endswith("scan") else "unroll"
    config = lora_config(root, "dpo", layers, 60, dpo=DpoConfig(beta=0.5))
    config = dataclasses.replace(config, stage=StageConfig("dpo", str(tuned)))
    run.train(config, tmp_path / "run")
    begun, first = loading.load(tuned), loading.load(tmp_path / "run", step=0)
    assert max_difference(first.params, begun.params) == 0.0
    _, rows = read_csv(tmp_path / "run" / "eval_log.csv")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert rows[1]["accuracy"] > 0.9
    found = dpo.measure(config, loading.load(tmp_path / "run", step=60), Progress(io.StringIO()))
    assert found["margin"] == pytest.approx(rows[1]["margin"], abs=1e-3)


@pytest.mark.slow
def test_grpo_answers_with_what_it_learned(root: Path, tmp_path: Path) -> None:
    rl = RLConfig(questions=8, group_size=4, answer_tokens=8, inner_epochs=2, kl_coefficient=0.0)
    config = lora_config(root, "grpo", "scan", 9, rl=rl)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, sequence_length=16, microbatch_size=8, log_every=1),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-2, clip_norm=0.5),
    )
    run.train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "ratio" in line]
    assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert steps[0]["start_kl"] == pytest.approx(0.0, abs=1e-5)
    assert steps[4]["ratio"] == pytest.approx(1.0, abs=1e-5)  # new answers, of the policy that has learned
    assert steps[4]["start_kl"] > 1e-3
    _, rows = read_csv(tmp_path / "run" / "eval_log.csv")
    assert rows[0]["start_kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[-1]["start_kl"] > 1e-3


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_it_continues_bit_for_bit(stage: str, root: Path, tmp_path: Path) -> None:
    config = lora_config(root, stage, "scan" if stage == "dpo" else "unroll", 4)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=1))
    assert_resumes(root, config, tmp_path)


def test_another_rank_is_another_run(root: Path, tuned: Path) -> None:
    config = lora_config(root, "sft", "scan" if tuned.name.endswith("scan") else "unroll", 30)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=RANK + 1))
    with pytest.raises(UserError, match=r"lora\.rank"):
        run.train(config, tuned)


@pytest.mark.parametrize("stage", ["pretrain", "distill", "reward", "ppo"])
def test_stages_that_train_all_parameters_refuse_a_rank(stage: str, root: Path) -> None:
    config = config_of(root, stage, lora=LoraConfig(rank=RANK), rl=RLConfig(answer_tokens=8))
    with pytest.raises(UserError, match="adapters are for sft, dpo and grpo"):
        from_config_dict(to_dict(config))
    from_config_dict(to_dict(dataclasses.replace(config, lora=LoraConfig())))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"rank": -1}, "must be at least 0"), ({"rank": 2, "alpha": 0.0}, "must be above 0")],
)
def test_senseless_settings_are_refused(changes: dict[str, Any], complaint: str, root: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        from_config_dict(to_dict(config_of(root, "sft", lora=LoraConfig(**changes))))


def test_muon_is_refused(root: Path) -> None:
    config = lora_config(root, "sft", "unroll", 2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))
    with pytest.raises(UserError, match="Muon is for whole kernels"):
        from_config_dict(to_dict(config))
