"""Where the chunks of a byte-level model begin, as others see it: through the family's door, in a run and its page."""

from __future__ import annotations

import base64
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from smallcoder_jax import run
from smallcoder_jax.config import EvalConfig, OptimizerConfig
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.train.evaluation import find_boundaries
from tests.helpers import FLOAT32, packed_batch, tiny_config, tiny_model
from tests.models.test_hnet import FLAT, STAGED, config_of, made

pytestmark = pytest.mark.usefixtures("standard_promotion")
INPUTS = ("tokens", "positions", "segment_ids")
SMALL = dataclasses.replace(STAGED, width=16, inner_widths=(16, 32), encoder_blocks=(1, 1), blocks=1)


@functools.partial(jax.jit, static_argnums=0)
def compiled(model: Any, params: Any, *inputs: Any) -> Any:
    module = build.bind(build.abstract_model(model, FLOAT32)[0], params)
    of_family = family_of(model).boundaries
    assert of_family is not None
    return of_family(module, *inputs), module(*inputs).observed


def boundaries(params: Any, batch: Any) -> Any:
    """Those of `SMALL` in two rows of 64, and what the model observes."""
    padded = (np.pad(rows := batch[name], [(0, 2 - rows.shape[0]), (0, 64 - rows.shape[1])]) for name in INPUTS)
    return jax.device_get(compiled(SMALL, params, *padded))


@pytest.fixture(scope="module")
def params() -> Any:
    return made(SMALL)


def test_they_are_those_that_the_model_counts(params: Any) -> None:
    """Each stage within begins its chunks at chunks of the one around it, and packed documents at their start."""
    batch = packed_batch(SMALL, rows=2, length=64, seed=0)
    (outer, inner), observed = boundaries(params, batch)
    assert outer[0].sum() == observed["boundaries_1"][0]
    assert inner[0].sum() == observed["boundaries_2"][0] > 0
    assert observed["boundaries_2"][1] == outer[0].sum()
    assert observed["chunk_length_2"] == observed["boundaries_2"][::-1]
    assert not np.any(inner[0] & ~outer[0])
    assert np.array_equal(outer[0], outer[1] > 0.5)
    assert np.array_equal(inner[0], inner[1] > 0.5)
    assert not np.any(inner[1][~outer[0]])
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    assert np.all(outer[1][starts] == 1.0)
    assert np.all(inner[1][starts] == 1.0)
    assert not np.any(outer[0][batch["segment_ids"] == 0])


def test_padding_in_front_changes_nothing(params: Any) -> None:
    batch = {name: values[:1, :40] for name, values in packed_batch(SMALL, 1, 64, 1).items()}
    moved = {name: np.pad(values, [(0, 0), (24, 0)]) for name, values in batch.items()}
    for alone, behind in zip(boundaries(params, batch)[0], boundaries(params, moved)[0], strict=True):
        np.testing.assert_array_equal(alone[0][:, :40], behind[0][:, 24:])
        np.testing.assert_allclose(alone[1][:, :40], behind[1][:, 24:], atol=1e-5)
        assert not behind[0][:, :24].any()


def test_the_first_held_out_document_is_shown(params: Any) -> None:
    batch = packed_batch(SMALL, rows=1, length=64, seed=2)
    task: Any = SimpleNamespace(tokenizer=ByteTokenizer(), validation_batches=lambda limit, rows: [batch][:limit])
    config = tiny_config(model=SMALL)
    found = find_boundaries(config, task, {"model": params})
    assert found is not None
    count = int((batch["segment_ids"] == 1).sum())
    assert [len(found.pieces), *(len(row) for stage in found.stages for row in stage)] == [count] * 5
    assert found.pieces == [ByteTokenizer().token_bytes[i] for i in batch["tokens"][0, :count]]
    cut = {name: batch[name][:, :count] for name in INPUTS}
    for shown, expected in zip(found.stages, boundaries(params, cut)[0], strict=True):
        np.testing.assert_array_equal(shown[0], expected[0][0, :count])


def test_a_model_without_chunks_has_no_picture() -> None:
    batch = packed_batch(SMALL, rows=1, length=32, seed=2)
    task: Any = SimpleNamespace(tokenizer=ByteTokenizer(), validation_batches=lambda limit, rows: [batch][:limit])
    assert find_boundaries(tiny_config(model=tiny_model()), task, {}) is None
    flat = {"model": build.init_params(FLAT, FLOAT32, jax.random.key(0))}
    assert find_boundaries(tiny_config(model=FLAT), task, flat) is None
    nothing: Any = SimpleNamespace(validation_batches=lambda limit, rows: iter(()))  # as of a policy
    assert find_boundaries(tiny_config(model=SMALL), nothing, {}) is None


@pytest.mark.slow
def test_a_run_shows_and_measures_them(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for number in range(20):
        text = f"def function_{number}(x):\n    # adds {number} to é\n    return x + {number}\n"
        (tmp_path / "code" / f"f{number:02d}.py").write_text(text)
    model = dataclasses.replace(SMALL, inner_widths=(32,), encoder_blocks=(1,), decoder_blocks=(1,))
    config = dataclasses.replace(
        config_of(tmp_path, model, steps=1),
        optimizer=OptimizerConfig(warmup_steps=0),
        eval=EvalConfig(batches=1, sample_tokens=8, sample_prompts=("é", "x")),
    )
    outcome = run.train(config, tmp_path / "run")
    picture = (tmp_path / "run" / "charts" / "boundaries.png").read_bytes()
    assert base64.b64encode(picture).decode() in (tmp_path / "run" / "report.html").read_text()
    measured = run.evaluate_run(tmp_path / "run", config)
    own = {"utf8_validity", "utf8_cut_off", "ratio", "boundaries_1", "overflow_1", "chunk_length_1"}
    assert own <= outcome.evaluation.keys()
    assert own <= measured.keys()
    assert measured["chunk_length_1"] == pytest.approx(1 / measured["boundaries_1"], rel=0.05)
    assert 0.0 <= measured["utf8_validity"] + measured["utf8_cut_off"] <= 1.0
    assert measured["utf8_validity"] == outcome.evaluation["utf8_validity"]
