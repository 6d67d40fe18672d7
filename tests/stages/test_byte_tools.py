"""A byte-level model learns to call functions: fine-tuning on calls, preferences between calls, rewards for calls."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from smallcoder_jax import loading, run
from smallcoder_jax.config import (
    Config,
    DialogConfig,
    HnetConfig,
    PreferencesConfig,
    RLConfig,
    StageConfig,
    TokenizerConfig,
)
from smallcoder_jax.data.conversations.tools import prepare_tool_dialogs
from tests.stages.pairs import config_of

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.slow]
LENGTH = 1536  # bytes; half of the conversations are longer


def byte_config(root: Path, stage: Any) -> Config:
    config = config_of(root, stage)
    return dataclasses.replace(
        config,
        model=HnetConfig(vocab_size=260, width=16, blocks=1, context=LENGTH),
        tokenizer=TokenizerConfig("bytes_tools"),
        stage=StageConfig(stage, "" if stage == "pretrain" else str(root / "start")),
        dialogs=DialogConfig(count=40, seed=2),
        preferences=PreferencesConfig(sources="conversations", count=20),
        rl=RLConfig(prompt_count=40, questions=4, group_size=2, answer_tokens=256, inner_epochs=1),
        train=dataclasses.replace(config.train, batch_size=8, sequence_length=64 if stage == "pretrain" else LENGTH),
        eval=dataclasses.replace(config.eval, batches=1),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start` was trained on code."""
    root = tmp_path_factory.mktemp("byte_tools")
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(byte_config(root, "pretrain"), root / "start")
    prepare_tool_dialogs(root / "data", 40, 2, lambda name, arguments: "42")  # so that no test calls anything
    return root


def test_fine_tuning_on_calls(root: Path, tmp_path: Path) -> None:
    config = byte_config(root, "sft")
    outcome = run.train(config, tmp_path / "run")
    before = run.reevaluate(config, *_checkpoint(tmp_path / "run", 0))
    assert outcome.evaluation["loss"] < before
    loaded = loading.load(tmp_path / "run")
    assert (loaded.tokenizer.vocab_size, loaded.tokenizer.hash) == (260, loading.load(root / "start").tokenizer.hash)


def test_preferences_between_calls(root: Path, tmp_path: Path) -> None:
    outcome = run.train(byte_config(root, "dpo"), tmp_path / "run")
    assert outcome.step == 2
    assert outcome.evaluation["margin"] != 0.0


def test_rewards_for_calls(root: Path, tmp_path: Path) -> None:
    outcome = run.train(byte_config(root, "grpo"), tmp_path / "run")
    assert outcome.step == 2
    assert 0.0 <= outcome.evaluation["ended"] <= 1.0


def _checkpoint(folder: Path, step: int) -> tuple[Path, dict[str, Any]]:
    loaded = loading.load(folder, step=step)
    return Path(loaded.info["step_folder"]), loaded.info
