"""launch/local.sh: what is tried again, and what is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "local.sh"


def launch(folder: Path, codes: list[int]) -> tuple[int, list[str]]:
    """Its exit code, and the arguments of every attempt, where the attempts end with `codes`, the last one for ever."""
    for i, code in enumerate([*codes, codes[-1], codes[-1]]):
        (folder / f"code{i}").write_text(str(code))
    trainer = folder / "python"
    trainer.write_text(
        f'#!/bin/sh\ncd {folder}\ntouch calls\ni=$(wc -l < calls)\necho "$@" >> calls\nexit "$(cat "code$((i))")"\n'
    )
    trainer.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(trainer), "RETRIES": "2"}
    command = ["bash", str(SCRIPT), "configs/x.py", "--workdir=runs/x y"]
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    return ended.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 2, 3, 75, 130])
def test_an_end_that_a_second_attempt_would_not_change(code: int, tmp_path: Path) -> None:
    assert launch(tmp_path, [code]) == (code, ["-m smallcoder_jax.main --config=configs/x.py --workdir=runs/x y"])


def test_a_crash_is_tried_again(tmp_path: Path) -> None:
    code, calls = launch(tmp_path, [137, 0])
    assert (code, len(calls)) == (0, 2)


def test_crashes_are_tried_again_as_often_as_asked(tmp_path: Path) -> None:
    code, calls = launch(tmp_path, [1])
    assert (code, len(calls)) == (1, 3)


def test_without_a_config_the_usage_is_shown() -> None:
    ended = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stdout.startswith("Trains a config")
    assert ended.stdout.rstrip().endswith("(default 3).")
