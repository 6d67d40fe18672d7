"""Fine-tuning: from a start, on what the assistant wrote; turns that end; the run of a stage as a whole."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import json
import os
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import smallcoder_jax
from smallcoder_jax import loading, run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import CheckpointConfig, Config, DialogConfig, StageConfig, TokenizerConfig
from smallcoder_jax.data.conversations.tools import prepare_tool_dialogs
from smallcoder_jax.evaluate import verify
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.stages import sft
from smallcoder_jax.tokenizers import chat
from smallcoder_jax.tokenizers.base import IM_END
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.helpers import tiny_model
from tests.stages.pairs import assert_resumes, config_of, make_root

pytestmark = pytest.mark.usefixtures("standard_promotion")
LENGTH = 1024


def answer(name: str, arguments: dict[str, Any]) -> str:
    return "42"


def tools_config(root: Path, stage: Any = "sft", **train: Any) -> Config:
    config = config_of(root, stage)
    return dataclasses.replace(
        config,
        model=tiny_model(vocab_size=500, width=32, mlp_width=64, layers=1, heads=2, kv_heads=1, context=LENGTH),
        tokenizer=TokenizerConfig(),
        dialogs=DialogConfig(count=60, seed=2),
        train=dataclasses.replace(config.train, batch_size=8, **{"sequence_length": LENGTH, **train}),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start` was trained on code with a tokenizer that has pieces for turns; `bytes` with one that has none."""
    root = tmp_path_factory.mktemp("sft")
    make_root(root)
    (root / "start").rename(root / "bytes")
    for module in (argparse, textwrap, json.decoder):  # enough text for a tokenizer
        (root / "code" / f"{module.__name__}.py").write_text(inspect.getsource(module))
    config = tools_config(root, "pretrain")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(dataclasses.replace(config, stage=StageConfig()), root / "start")
    prepare_tool_dialogs(root / "data", 60, 1, answer)  # so that no test calls anything
    return root


def test_a_model_learns_to_answer_and_to_stop(root: Path, tmp_path: Path) -> None:
    """On a single conversation, so that there is nothing but the stopping to learn."""
    config = tools_config(root, steps=60, sequence_length=32)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=60))
    loaded = loading.load(root / "start")
    question, reply = chat.Message("user", "Say four."), chat.Message("assistant", "four")
    record = sft.prepare(config, None).read("train")[0]
    only = dataclasses.replace(record, conversation=chat.Conversation((question, reply)))
    folder = sft.prepare(config, None).folder

    class One:
        counts, fingerprint, unusable = {"train": 1, "validation": 1}, "one", ()

        def read(self, side: str) -> list[Any]:
            return [only]

    assert folder.is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "prepare", lambda config, progress: One())
        run.train(config, tmp_path / "run")
    prompt = chat.encode(chat.Conversation((question,)), loaded.tokenizer, reply=True).ids.tolist()
    options = SamplingOptions(max_tokens=32, temperature=0.0)
    found = smallcoder_jax.load(tmp_path / "run").generator.generate([prompt], options)[0]
    assert (found.text, found.finish_reason) == ("four", "stop")
    assert found.token_ids[-1] == loaded.tokenizer.specials[IM_END]
    before = loaded.generator.generate([prompt], options)[0]
    assert before.text != "four"


def test_what_a_run_begins_with_is_evaluated_and_recorded(root: Path, tmp_path: Path) -> None:
    result = run.train(tools_config(root, steps=3), tmp_path / "run")
    _, rows = read_csv(tmp_path / "run" / "eval_log.csv")
    assert [row["step"] for row in rows] == [0, 3]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert result.evaluation["loss"] == pytest.approx(rows[1]["loss"])
    begun = loading.load(root / "start")
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    # Its path is as it is from the run folder, so that both can move.
    assert recorded["started_from"] == {**begun.origin, "path": os.path.relpath(root / "start", tmp_path / "run")}
    assert recorded["identity"]["start"] == begun.origin["hash"]
    first = loading.load(tmp_path / "run", step=0)
    jax.tree.map(np.testing.assert_array_equal, first.params, begun.params)
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["started_from"] == recorded["started_from"]["path"]


def test_another_start_is_another_run(root: Path, tmp_path: Path) -> None:
    config = tools_config(root, steps=1)
    run.train(config, tmp_path / "run")
    other = dataclasses.replace(config, stage=StageConfig("sft", str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"holds another run(.|\n)*start: the run has"):
        run.train(other, tmp_path / "run")


def test_a_model_of_bytes_can_call_functions(root: Path) -> None:
    """The rows that it would learn from; `test_byte_tools.py` trains one."""
    loaded = dataclasses.replace(loading.load(root / "start"), tokenizer=ByteTokenizer(tools=True))
    config = tools_config(root)
    batch = next(iter(sft.make_task(config, loaded, Progress(io.StringIO())).validation_batches(1, range(8))))
    counted = batch["targets"][batch["loss_weights"] > 0].tolist()
    call = counted[counted.index(256) : counted.index(257)]
    assert bytes(call[1:]).startswith(b'\n{"name": "')


@pytest.mark.slow
def test_a_resume_is_exact(root: Path, tmp_path: Path) -> None:
    assert_resumes(root, tools_config(root), tmp_path)


def test_a_run_of_conversations_verifies_until_its_weights_are_others(root: Path, tmp_path: Path) -> None:
    config = tools_config(root, steps=2)
    run.train(config, tmp_path / "run")
    verdict = verify.verify(tmp_path / "run", run.reevaluate)
    assert verdict.status == "verified", verdict.reason
    assert verdict.loss == pytest.approx(verdict.recorded_loss, rel=1e-4)
    log = tmp_path / "run" / "eval_log.csv"
    lines = log.read_text().splitlines()
    cells = lines[-1].split(",")
    cells[1] = str(float(cells[1]) * 1.1)
    log.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    assert verify.verify(tmp_path / "run", run.reevaluate).status == "corrupt"
    path = sft.prepare(config, None).folder / "train.jsonl"
    kept = path.read_text()
    try:
        path.write_text(kept.replace("42", "43"))
        assert verify.verify(tmp_path / "run", run.reevaluate).status == "error"
    finally:
        path.write_text(kept)


def test_scores_of_an_untrained_model_are_near_nothing(root: Path) -> None:
    config = dataclasses.replace(tools_config(root), eval=dataclasses.replace(tools_config(root).eval, batches=1))
    scores = run.evaluate_run(root / "start", config)
    assert scores["valid_json"] == 0.0
    assert set(scores) >= {"valid_json", "right_tool", "right_arguments", "ended"}


def test_what_cannot_be_begun_with_is_refused(root: Path, tmp_path: Path) -> None:
    config = tools_config(root)
    for start, said in (
        ("", "set --config.stage.start to the folder"),
        (str(tmp_path / "nowhere"), "does not exist"),
        (
            str(root / "bytes"),
            r"model.vocab_size: 256 there, 500 here\. A table of tokens does not grow between stages",
        ),
    ):
        with pytest.raises(UserError, match=said):
            run.train(dataclasses.replace(config, stage=StageConfig("sft", start)), tmp_path / "run")
    config = dataclasses.replace(config, model=loading.load(root / "bytes").model, tokenizer=TokenizerConfig("bytes"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, sequence_length=64))
    with pytest.raises(UserError, match=r"has no piece <.*tokenizer.kind=bytes_tools for a model of bytes"):
        run.train(dataclasses.replace(config, stage=StageConfig("sft", str(root / "bytes"))), tmp_path / "run")
