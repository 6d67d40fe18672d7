"""A model is measured on the documents that were set apart for it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import jax
import pytest

from smallcoder_jax import run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.tokens.prepare import prepare
from smallcoder_jax.evaluate import bits_per_byte
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models import build
from smallcoder_jax.stages.shared.documents import measure
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.evaluate.conftest import small_config
from tests.helpers import FLOAT32


def test_measures_are_of_the_split_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for i in range(60):
        text = f"def function_{i}(value):\n    return value + {i} * {i % 7}  # {'x' * i}\n"
        (tmp_path / "code" / f"module_{i}.py").write_text(text)
    config = small_config(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_fraction=0.3))
    params = build.init_params(config.model, FLOAT32, jax.random.key(0))
    origin = {"path": "somewhere", "step": 0, "hash": ""}
    loaded = LoadedModel(config.model, FLOAT32, params, ByteTokenizer(), Path("somewhere"), {}, origin)
    prepared = prepare(config)
    entry = prepared.manifest.sources[0]
    for split in ("validation", "test"):
        evaluated = dataclasses.replace(config, eval=dataclasses.replace(config.eval, split=split))
        found = measure(evaluated, loaded, Progress(io.StringIO()))
        assert found["bytes"] == entry.splits[split].bytes
        assert found["data"]["split"] == split
        cache = prepared.tokens_folder / bits_per_byte.CACHES[split]
        assert json.loads(cache.read_text())["bits_per_byte"] == found["references"]
    references = [bits_per_byte.held_out_references(prepared, split) for split in ("validation", "test")]
    assert references[0] != references[1]
    assert "utf8_validity" not in found  # no samples are asked for
    asked = dataclasses.replace(config.eval, sample_tokens=4, sample_prompts=("é",))
    found = measure(dataclasses.replace(config, eval=asked), loaded, Progress(io.StringIO()))
    assert 0.0 <= found["utf8_validity"] + found["utf8_cut_off"] <= 1.0
    wide = ByteTokenizer()
    wide.token_bytes = [*wide.token_bytes[:-1], b"ab"]  # not a tokenizer of bytes: nothing is generated
    found = measure(
        dataclasses.replace(config, eval=asked), dataclasses.replace(loaded, tokenizer=wide), Progress(io.StringIO())
    )
    assert "utf8_validity" not in found


def test_training_is_not_judged_on_the_test_documents(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, split="test"))
    with pytest.raises(UserError, match=r"eval.split='test' is for --mode=evaluate, after training"):
        run.train(config, tmp_path / "run")
