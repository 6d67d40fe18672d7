"""One document a step: the settings of each preset, what is passed over, and an end where nothing usable comes."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    TokenizerConfig,
    TrainConfig,
    from_config_dict,
)
from smallcoder_jax.data.corpus.collect import collect_source
from smallcoder_jax.data.sources.spec import parse_sources
from smallcoder_jax.run import train
from tests.helpers import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
get_config = runpy.run_path(str(ROOT / "configs" / "stages" / "stream.py"))["get_config"]


@pytest.mark.parametrize(
    ("argument", "steps", "warmup", "every"),
    [("nano,test", 100, 10, 50), ("tiny,development", 1000, 100, 200), ("small", 10_000, 1000, 1000)],
)
def test_what_a_preset_sets(argument: str, steps: int, warmup: int, every: int) -> None:
    config = from_config_dict(get_config(argument))
    assert (config.train.steps, config.train.batch_size, config.train.sequence_length) == (steps, 1, 256)
    assert (config.optimizer.schedule, config.optimizer.learning_rate) == ("constant", 1e-3)
    assert (config.optimizer.warmup_steps, config.eval.every) == (warmup, every)
    assert (config.data.packing, config.data.max_unusable, config.data.fim_rate) == ("document", 1000, 0.0)
    assert config.data.max_documents > steps


def test_a_preset_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match=r"there is no preset 'prod'.*production"):
        get_config("nano,prod")


def stream_config(root: Path, texts: list[str], **data: Any) -> Config:
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings: dict[str, Any] = {
        "sources": f"jsonl:{root / 'texts.jsonl'}",
        "dir": str(root / "data"),
        "packing": "document",
        "fim_rate": 0.0,
        "min_characters": 1,
        "validation_fraction": 0.2,
        **data,
    }
    return dataclasses.replace(
        tiny_config(),
        model=tiny_model(vocab_size=256),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(**settings),
        train=TrainConfig(steps=4, batch_size=1, sequence_length=32, log_every=1),
        mesh=MeshConfig(data=1, context=4, tensor=2),  # one row does not divide over eight devices
        eval=EvalConfig(every=0, batches=1, batch_size=8, sample_tokens=0),
        log=LogConfig(tensorboard=False, charts_every=0),
    )


@pytest.mark.usefixtures("standard_promotion")
def test_a_step_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{number} " * (40 if number % 2 else 2) for number in range(60)]
    config = stream_config(tmp_path, texts, min_tokens=24)
    run = train(config, tmp_path / "run")
    assert (run.step, run.tokens_seen) == (4, 4 * 32)  # every row is full: the usable documents are longer
    said = re.search(r"unusable +(\d+) of (\d+) documents, with fewer than 24 tokens", capsys.readouterr().err)
    assert said is not None
    assert 0 < int(said[1]) <= 30 < int(said[2]) < 60


def test_a_stream_in_which_nothing_usable_comes_is_not_read_on(tmp_path: Path) -> None:
    texts = [f"text {number} " * (20 if number in (0, 150) else 1) for number in range(400)]
    config = stream_config(tmp_path, texts, min_characters=50, max_unusable=200)
    (spec,) = parse_sources(config.data.sources)
    with pytest.raises(UserError, match=r"200 documents in a row were unusable \(of 351 read so far: short 349\)"):
        collect_source(spec, config.data, tmp_path / "spool", set(), None)
    packed = dataclasses.replace(config.data, packing="concat")
    assert collect_source(spec, packed, tmp_path / "spool", set(), None).read == 400


@pytest.mark.usefixtures("standard_promotion")
def test_nothing_usable_ends_the_run(tmp_path: Path) -> None:
    config = stream_config(tmp_path, [f"text {number}" for number in range(60)], min_tokens=24, max_unusable=200)
    with pytest.raises(UserError, match="200 documents in a row were unusable: each has fewer than 24 tokens"):
        train(config, tmp_path / "run")
