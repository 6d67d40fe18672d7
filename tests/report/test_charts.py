"""Charts: valid PNG files of the stated size, for every kind of history."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from smallcoder_jax.report import charts
from smallcoder_jax.report.run_folder import RunFolder


def history(steps: int) -> dict[str, Any]:
    numbers = np.arange(1, steps + 1)
    return {
        "steps": numbers.tolist(),
        "loss": (2 + 6 / numbers).tolist(),
        "accuracy": (0.5 - 0.5 / numbers).tolist(),
        "throughput": [1000.0] * steps,
        "learning_rate": [1e-3] * steps,
        "grad_norm": (1 / numbers).tolist(),
        "data_wait": [0.0] * steps,
        "eval_steps": [1, steps],
        "eval_loss": [8.0, 2.5],
        "eval_accuracy": [0.0, 0.4],
        "eval_bits_per_byte": [5.0, 1.6],
        "references": {"gzip -9": 1.98, "xz -9e": 1.87},
    }


GAPS = history(30) | {"loss": [None, math.inf] + [2.0] * 28, "grad_norm": [0.0] * 30, "throughput": [math.nan] * 30}
ONE = {name: values[:1] if isinstance(values, list) else values for name, values in history(1).items()}


@pytest.mark.parametrize(
    "values",
    [history(60), ONE, GAPS, {}, {"steps": [5], "loss": [None]}, {"eval_steps": [5], "eval_loss": [1.0]}],
    ids=["run", "one point", "gaps", "nothing", "no finite loss", "evaluation only"],
)
def test_charts_are_png_files_of_the_stated_size(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    path = charts.draw_training(values, folder, 70)
    assert path == folder.charts / "training_step_000070.png"  # whatever was logged last
    assert path.read_bytes() == folder.latest_chart.read_bytes()
    pixels = charts.read_png(path)
    assert pixels.shape == (840, 1500, 4)
    assert pixels.dtype == np.uint8
    assert pixels.min() < 100  # something is drawn
    assert pixels.max() == 255


def test_the_comparison_says_what_each_side_was_measured_on() -> None:
    axes = Figure().subplots()
    values = history(3)
    charts._draw_bits_per_byte(axes, charts._Curves(values, "eval_"), values["references"])
    legend = axes.get_legend()
    assert legend is not None
    (model,) = legend.get_texts()
    assert "on the rows evaluated" in model.get_text()
    assert axes.get_title("right") == "compressors: all held-out files"
    named = [text.get_text() for text in axes.texts]
    assert named == [f"{name}  {value:.3f}" for name, value in values["references"].items()]


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    steps = np.arange(100_000.0)
    values = np.zeros_like(steps)
    values[[12_345, 98_765]] = 7.0, -7.0
    thin_steps, thin_values = charts._thin(steps, values)
    assert thin_steps.size <= 1.1 * charts.MAX_POINTS
    assert (thin_steps[0], thin_steps[-1]) == (0, 99_999)
    assert np.all(np.diff(thin_steps) > 0)
    assert set(thin_values) == {-7.0, 0.0, 7.0}


def test_smoothing_keeps_a_straight_line_and_the_length() -> None:
    values = np.full(500, 3.0)
    np.testing.assert_allclose(charts._smooth(values), values)
    noise = np.random.default_rng(0).normal(size=500)
    assert charts._smooth(noise).std() < 0.5


def test_drawing_touches_no_shared_state(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps(history(30)))
    program = """
import json, pathlib, sys
import matplotlib
before = matplotlib.rcParams.copy()
from smallcoder_jax.report import charts, run_folder
folder = run_folder.RunFolder(pathlib.Path(sys.argv[1]))
charts.draw_training(json.loads((folder.path / "history.json").read_text()), folder, 1)
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    environment = os.environ | {"PYTHONPATH": str(Path(charts.__file__).parents[2])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("measures", "titles"),
    [
        ({"bits_per_byte": [5.0, 1.6], "perplexity": [8.0, 3.0]}, ["Bits per byte, validation", "Next-token accuracy"]),
        ({"perplexity": [8.0, 3.0]}, ["Perplexity", "Next-token accuracy"]),
        ({"margin": [0.0, 1.0]}, ["Margin", "Better answer above"]),
        ({"reward": [0.1, 0.4]}, ["Mean reward", "Next-token accuracy"]),
        ({"reward": [0.1, 0.4], "start_kl": [0.0, 2.0]}, ["Mean reward", "Divergence from the start"]),
        ({}, ["Bits per byte, validation", "Next-token accuracy"]),
    ],
)
def test_a_stage_shows_what_it_is_judged_by(
    measures: dict[str, list[float]], titles: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[str] = []
    panel = charts._panel
    monkeypatch.setattr(charts, "_panel", lambda axes, title, unit: (drawn.append(title), panel(axes, title, unit))[1])
    values = {name: value for name, value in history(3).items() if name not in ("eval_bits_per_byte", "references")}
    charts.draw_training(values | {f"eval_{name}": value for name, value in measures.items()}, RunFolder(tmp_path), 1)
    assert drawn[1:3] == titles


def test_a_margin_is_shown_with_both_of_its_sides() -> None:
    axes = Figure().subplots()
    values = {"eval_steps": [1, 2], "eval_margin": [0.0, 0.5], "eval_chosen_reward": [0.0, -1.0]}
    values["eval_rejected_reward"] = [0.0, -1.5]
    charts._draw_measure(axes, charts._Curves(values, ""), charts._Curves(values, "eval_"), "margin", "Margin", "")
    legend = axes.get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["validation  0.500", "chosen, validation  -1.000", "rejected, validation  -1.500"]
