"""Stages in a row: what follows what, the ledger, what is judged, and a whole chain of a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax import pipeline
from smallcoder_jax.base.errors import EXIT_INTERRUPTED, CheckFailed, UserError
from smallcoder_jax.base.files import read_json
from smallcoder_jax.config import Config, Measure, StageConfig, validate
from smallcoder_jax.pipeline import Change, Done, Planned
from smallcoder_jax.run import Run
from tools import run_stages

WORKDIR = Path("work")


def test_each_stage_begins_with_the_policy_before_it() -> None:
    planned = {each.stage: each.config for each in pipeline.plan("nano", pipeline.STAGES, WORKDIR, [])}
    assert list(planned) == list(pipeline.STAGES[1:])
    assert {stage: config.stage.start for stage, config in planned.items()} == {
        "language": "",
        "code": "work/language",
        "tools": "work/code",
        "reward": "work/tools",
        "dpo": "work/tools",
        "ppo": "work/dpo",
        "grpo": "work/ppo",
        "distill": "",
    }
    assert planned["distill"].distill.teacher == "work/code"
    assert planned["ppo"].rl.reward_model == "work/reward"
    assert {config.tokenizer.path for config in planned.values()} == {"work/tokenizer"}


def test_a_part_of_the_stages() -> None:
    planned = pipeline.plan("small", ("code", "tools"), WORKDIR, ["--config.train.steps=7"])
    assert [each.config.stage.start for each in planned] == ["", "work/code"]
    assert {each.config.train.steps for each in planned} == {7}
    assert {each.config.tokenizer.path for each in planned} == {""}


@pytest.mark.parametrize("variant", ["nano", "tiny", "medium_lc", "staged_tiny", "staged_xlarge"])
def test_every_stage_has_a_config_for_every_variant(variant: str) -> None:
    assert len(pipeline.plan(variant, pipeline.STAGES, WORKDIR, [])) == len(pipeline.STAGES) - 1


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (("code", "language"), "in the order tokenizer,language,code"),
        (("code", "code"), "expected each once"),
        (("coed",), "did you mean 'code'"),
        (("tools", "ppo"), "ppo needs the stage reward"),
        (("distill",), "needs a teacher"),
    ],
)
def test_what_cannot_follow_is_refused(stages: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pipeline.plan("nano", stages, WORKDIR, [])


@pytest.mark.parametrize("stages", ["tokenizer,language,code", "code", "code,tools,reward"])
def test_what_cannot_be_exported_at_the_end_is_refused_before_anything_is_trained(
    stages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(pipeline, "ensure_tokenizer", lambda planned, folder, progress: begun.append("tokenizer"))
    monkeypatch.setattr(pipeline, "run_stage", lambda each, workdir: begun.append(each.stage))
    flags = ["--variant=staged_tiny", f"--stages={stages}", f"--workdir={tmp_path / 'work'}"]
    with pytest.raises(UserError, match=r"cannot be exported to transformers: llama needs .*add --no-export"):
        run_stages.main(flags)
    assert not begun
    assert run_stages.main([*flags, "--no-export"]) == EXIT_INTERRUPTED  # the first stage ends at once
    assert begun
    assert run_stages.main(["--variant=staged_tiny", "--stages=reward", f"--workdir={tmp_path}"]) == EXIT_INTERRUPTED


def test_without_an_export_every_run_is_still_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("tools.export.main", lambda flags: called.append(("export", flags)))
    monkeypatch.setattr("tools.verify_models.main", lambda flags: called.append(("verify", flags)))
    run_stages.finish([tmp_path / "code"], [tmp_path / "language", tmp_path / "code"], export=False)
    verified = ("verify", [f"--run={tmp_path / 'language'}", f"--run={tmp_path / 'code'}"])
    assert called == [verified]
    run_stages.finish([tmp_path / "code"], [tmp_path / "language", tmp_path / "code"], export=True)
    assert called == [verified, ("export", [f"--checkpoint={tmp_path / 'code'}"]), verified]


def test_a_stage_that_is_done_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(config: Config, folder: Path) -> Run:
        trained.append(config.train.steps)
        return Run(folder, config.train.steps, len(trained) == 1, {}, 0)

    monkeypatch.setattr(pipeline.run, "train", train)
    monkeypatch.setattr(pipeline, "_measures", lambda each: {"bits_per_byte": Change(None, 2.0)})
    config = Config(stage=StageConfig(measures=("bits_per_byte lower",)))
    each = Planned("language", tmp_path / "language", config)
    assert pipeline.run_stage(each, tmp_path) is None  # a signal came
    done = pipeline.run_stage(each, tmp_path)
    assert done is not None
    assert done.measures == {"bits_per_byte": Change(None, 2.0)}
    assert pipeline.run_stage(each, tmp_path) == done
    assert len(trained) == 2
    other = dataclasses.replace(each, config=dataclasses.replace(config, name="other"))
    pipeline.run_stage(other, tmp_path)
    assert len(trained) == 3


@pytest.mark.parametrize(
    ("measure", "before", "after", "said"),
    [
        (Measure("loss", "lower"), 2.0, 1.9, None),
        (Measure("loss", "lower"), 2.0, 2.0, "loss was 2.0, is 2, wanted lower"),
        (Measure("loss", "lower"), None, 9.0, None),
        (Measure("loss", "lower"), 2.0, float("nan"), "loss was 2.0, is nan, wanted lower"),
        (Measure("share", "higher", least=0.8), 0.1, 0.8, None),
        (Measure("share", "higher", least=0.8), 0.1, 0.79, "share was 0.1, is 0.79, wanted at least 0.8"),
        (Measure("share", "higher", least=0.8), 0.9, 0.85, "share was 0.9, is 0.85, wanted higher"),
        (Measure("kl", most=4.0), 0.0, 4.0, None),
        (Measure("kl", most=4.0), 0.0, 4.1, "kl was 0.0, is 4.1, wanted at most 4.0"),
        (Measure("kl", most=4.0), 0.0, float("nan"), "kl was 0.0, is nan, wanted at most 4.0"),
        (Measure("share"), 0.1, 0.0, None),
    ],
)
def test_what_is_judged(measure: Measure, before: float | None, after: float, said: str | None) -> None:
    assert pipeline.fault(measure, Change(before, after)) == said


@pytest.mark.parametrize(
    ("text", "measure"),
    [
        ("accuracy", Measure("accuracy")),
        ("valid_json higher >=0.8", Measure("valid_json", "higher", least=0.8)),
        ("reward <=4 lower error=gain_error", Measure("reward", "lower", most=4.0, error="gain_error")),
    ],
)
def test_a_measure_is_written_in_a_config(text: str, measure: Measure) -> None:
    assert Measure.parsed(text) == measure


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with the name of a measure"),
        (">=3", "begins with the name of a measure"),
        ("accuracy up", "'up' is none of higher, lower"),
        ("accuracy >=much", "could not convert string to float: 'much'"),
    ],
)
def test_a_measure_that_says_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"stage.measures has '{text}': .*{said}"):
        validate(Config(stage=StageConfig(measures=(text,))))


@pytest.mark.parametrize(
    ("better", "after", "said"),
    [
        ("higher", 2.21, None),
        ("higher", 2.19, "reward was 2.0, is 2.19, wanted higher by more than its noise, 2 x 0.1"),
        ("lower", 1.81, "reward was 2.0, is 1.81, wanted lower by more than its noise, 2 x 0.1"),
        ("lower", 1.79, None),
    ],
)
def test_what_could_be_noise_is_no_gain(better: Any, after: float, said: str | None) -> None:
    assert pipeline.fault(Measure("reward", better, error="gain_error"), Change(2.0, after, 0.1)) == said
    assert pipeline.fault(Measure("reward", better, error="gain_error"), Change(2.0, after, float("nan"))) is not None


def test_what_failed_is_named_with_its_stage() -> None:
    done = [
        Done("reward", 1.0, {"accuracy": Change(0.5, 0.7)}),
        Done("ppo", 1.0, {"reward": Change(1.0, 2.0, 0.1), "start_kl": Change(0.0, 9.0)}),
        Done("code", 1.0, {"bits_per_byte": Change(3.0, 2.0)}),
    ]
    planned = pipeline.plan("nano", pipeline.STAGES, WORKDIR, [])
    assert pipeline.failures(planned, done) == [
        "reward: accuracy was 0.5, is 0.7, wanted at least 0.8",
        "ppo: start_kl was 0.0, is 9, wanted at most 4.0",
    ]
    assert pipeline.table_rows(done)[0] == ("reward", "accuracy", Change(0.5, 0.7))


VARIANT = """
from smallcoder_jax.config import default_config
def get_config():
    config = default_config()
    config.name = "pico"
    config.model.update(vocab_size=600, width=64, mlp_width=96, layers=1, heads=2, kv_heads=1, head_size=32)
    config.model.context = 1024
    config.compute.dtype = "float32"
    config.optimizer.update(learning_rate=1e-2)
    return config
"""


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_chain_of_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every stage, three steps each, with real data and real calls; then export, verification, and a second start."""
    shutil.copytree(pipeline.CONFIGS / "stages", tmp_path / "configs" / "stages")
    (tmp_path / "configs" / "pico.py").write_text(VARIANT)
    monkeypatch.setattr(pipeline, "CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--variant=pico",
        "--workdir=work",
        "--no-check",
        "--config.data.max_documents=120",
        "--config.data.sources=stdlib",
        "--config.dialogs.count=60",
        "--config.preferences.count=40",
        "--config.rl.prompt_count=60",
        "--config.rl.questions=4",
        "--config.rl.group_size=4",
        "--config.rl.inner_epochs=2",
        "--config.rl.answer_tokens=128",
        "--config.train.steps=3",
        "--config.train.batch_size=8",
        "--config.train.microbatch_size=8",
        "--config.train.sequence_length=1024",
        "--config.optimizer.learning_rate=0.01",
        "--config.optimizer.warmup_steps=1",
        "--config.eval.every=0",
        "--config.eval.batches=1",
        "--config.eval.batch_size=8",
        "--config.eval.sample_tokens=0",
        "--config.log.tensorboard=False",
        "--config.log.charts_every=0",
    ]
    assert run_stages.main(flags) == 0
    said = capsys.readouterr().out
    for stage in pipeline.STAGES[1:]:
        assert f"\n{stage} " in said
        assert (tmp_path / "work" / stage / "checkpoints" / "best").exists()
    assert (tmp_path / "work" / "grpo" / "export" / "model.safetensors").exists()
    assert "verified" in said
    page = (tmp_path / "work" / "stages.html").read_text()
    assert "distill" in page
    assert "grpo/report.html" in page
    ledger = read_json(tmp_path / "work" / "stages.json", "a ledger")
    assert list(ledger) == list(pipeline.STAGES[1:])
    before = json.dumps(ledger)
    assert run_stages.main(flags) == 0
    assert json.dumps(read_json(tmp_path / "work" / "stages.json", "a ledger")) == before
    monkeypatch.setattr(pipeline, "failures", lambda planned, done: ["nothing got better"])
    with pytest.raises(CheckFailed, match="nothing got better"):
        run_stages.main([flag for flag in flags if flag != "--no-check"])


def test_every_run_of_a_chain_is_verified() -> None:
    planned = pipeline.plan("nano", pipeline.STAGES, WORKDIR, [])
    assert [folder.relative_to(WORKDIR).as_posix() for folder in pipeline.runs_of(planned)] == [
        *("language", "code", "tools", "reward", "dpo", "ppo", "grpo", "distill", "distill_alone")
    ]
