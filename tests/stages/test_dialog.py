"""Fine-tuning on questions and answers: the settings of each preset, and a model that learns to answer and to stop."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import (
    DataConfig,
    DialogConfig,
    EvalConfig,
    LogConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    from_config_dict,
)
from smallcoder_jax.run import evaluate_run, train
from tests.helpers import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
get_config = runpy.run_path(str(ROOT / "configs" / "stages" / "dialog.py"))["get_config"]


@pytest.mark.parametrize(
    ("argument", "batch", "count", "every", "rate", "steps"),
    [
        ("nano,test", 2, 100, 50, 5e-5, 45),
        ("tiny,development", 4, 1000, 200, 3e-5, 450),
        ("small", 8, 0, 1000, 2e-5, 17_551),
    ],
)
def test_what_a_preset_sets(argument: str, batch: int, count: int, every: int, rate: float, steps: int) -> None:
    config = from_config_dict(get_config(argument))
    assert (config.stage.name, config.dialogs.source) == ("sft", "hf:vicgalle/alpaca-gpt4")
    assert (config.train.batch_size, config.dialogs.count, config.eval.every) == (batch, count, every)
    assert (config.optimizer.learning_rate, config.train.steps) == (rate, steps)
    assert config.optimizer.warmup_steps == min(100, steps // 10)


def test_a_preset_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="there is no preset 'tests'; did you mean 'test'"):
        get_config("nano,tests")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_model_learns_to_answer_and_to_stop(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
        (tmp_path / "code" / f"f{number:02d}.py").write_text(text)
    rows = [{"instruction": f"Say yes, for the {number}th time.", "output": "yes"} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = dataclasses.replace(
        tiny_config(),
        model=tiny_model(vocab_size=400, context=128),
        tokenizer=TokenizerConfig(kind="sentencepiece"),
        data=DataConfig(sources=f"dir:{tmp_path / 'code'}", dir=str(tmp_path / "data"), validation_fraction=0.2),
        train=TrainConfig(steps=2, batch_size=8, sequence_length=64),
        eval=EvalConfig(every=0, batches=2, batch_size=8, sample_tokens=8),
        log=LogConfig(tensorboard=False, charts_every=0),
    )
    train(first, tmp_path / "first")
    config = dataclasses.replace(
        first,
        stage=StageConfig(name="sft", start=str(tmp_path / "first")),
        dialogs=DialogConfig(source=f"jsonl:{tmp_path / 'rows.jsonl'}", count=0, packed=False),
        train=TrainConfig(steps=30, batch_size=8, sequence_length=64),
    )
    before = evaluate_run(tmp_path / "first", config)
    run = train(config, tmp_path / "dialog")
    after = evaluate_run(tmp_path / "dialog", config)
    assert before["ended"] < 0.5
    assert after["ended"] == 1.0
    # "yes" and the end of the turn are all that the loss counts.
    assert run.evaluation["loss"] < 0.1
    info = json.loads((tmp_path / "dialog" / "training_info.json").read_text())
    assert info["dataset"] == config.dialogs.source
    assert info["started_from"] == "../first"  # from the run folder
    samples = json.loads((tmp_path / "dialog" / "text_samples.json").read_text())
    assert samples[-1]["output"].strip().startswith("yes")
