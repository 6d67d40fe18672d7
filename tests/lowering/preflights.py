"""Preflight of the variants on slices and nodes that are not here, each in under three minutes.

make test-lowering
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.presets import find_preset, preset_overrides
from smallcoder_jax.configfile import load_config

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny", "tiny_lc", "small", "small_lc", "medium")]
CONFIGS = ["medium_lc", *OTHERS]


def preflight(variant: str, topology: str, folder: Path, *overrides: str) -> dict[str, Any]:
    path = folder / "report.json"
    start = time.monotonic()
    done = subprocess.run(
        [
            sys.executable, "-m", "smallcoder_jax.main", "--mode=preflight", f"--config=configs/{variant}.py",
            f"--topology={topology}", "--price=1", "--tokens=1e9", f"--json={path}",
            *overrides,
        ],
        cwd=ROOT,
        # This process may have libtpu, of which one is allowed at a time where there is a TPU.
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))},
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    seconds = time.monotonic() - start
    assert done.returncode in (0, 3), done.stderr[-3000:]
    report = json.loads(path.read_text())
    assert (done.returncode == 0) == report["memory"]["fits"]
    print(f"{variant} on {topology}: {seconds:.0f} s\n{done.stdout}{done.stderr[-300:]}")
    assert seconds < SECONDS
    return report


def check(report: dict[str, Any], devices: int) -> None:
    assert report["devices"] == devices
    assert report["attention"].startswith("pallas_")
    if report["memory"]["fits"]:
        assert report["memory"]["peak"] <= report["memory"]["available"]
        assert 0 < report["roofline"]["mfu"] < 1 + 1e-9
        assert report["budget"]["cost"] > 0
        assert report["traffic"]["unknown_loops"] == 0
        reduced = {each["kind"]: each for each in report["traffic"]["collectives"]}
        microbatches = report["batch_size"] // report["microbatch_size"]
        assert devices == 1 or reduced["all-reduce"]["payload"] >= 4 * report["parameters"]
        assert devices == 1 or reduced["all-reduce"]["payload"] < 4.6 * report["parameters"] * microbatches
    else:
        assert report["remedy"]


def check_preset(name: str, variant: str, folder: Path) -> None:
    """The variant fits the preset's devices as it is set, and its batches divide over them."""
    preset = find_preset(name)
    overrides = preset_overrides(preset, load_config(str(ROOT / "configs" / f"{variant}.py"), []))
    report = preflight(variant, preset.topology, folder, *overrides)
    check(report, preset.devices)
    assert report["memory"]["fits"]
    assert report["changes"] == []
