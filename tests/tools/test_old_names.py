"""Tools that have moved are found under the names that they had."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

import tools

FOLDER = Path(tools.__file__).parent
MOVED = {
    path.stem: found[1]
    for path in sorted(FOLDER.glob("*.py"))
    if (found := re.search(r'^moved\(__name__, "([\w.]+)"\)$', path.read_text(), re.MULTILINE))
}


def test_there_are_such_tools() -> None:
    assert {"bench_step", "bench_kernels", "tune_kernels", "packed_rows", "attention_jax"} <= MOVED.keys()


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_is_the_same_module(name: str) -> None:
    module = importlib.import_module(MOVED[name])
    assert importlib.import_module(f"tools.{name}") is module
    assert module.__name__ == MOVED[name]


@pytest.mark.parametrize("name", [name for name in MOVED if name.startswith("bench")])
def test_an_old_command_runs_and_names_the_new_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"tools.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert f"this command is now: python -m {MOVED[name]}\n" in said.err
    assert f"usage: python -m {MOVED[name]}" in said.out
