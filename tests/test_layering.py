"""Imports point down only, and importing the package or asking for help touches nothing heavy."""

import ast
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from smallcoder_jax.config import StageConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "smallcoder_jax"
# Rooms from the bottom up; a room imports rooms of lower levels only, or itself.
LEVELS = [
    ["base"],
    ["config", "configfile", "kernels"],
    ["mesh", "tokenizers", "sandbox"],
    ["ops", "toolbox"],
    ["layers", "losses", "data.sources"],
    ["models", "optim", "data.corpus", "data.conversations"],
    ["data.tokens", "data.preferences"],
    ["data.rows"],
    ["generate", "huggingface", "report"],
    ["train"],
    ["loading", "evaluate", "preflight"],
    ["rl"],
    ["stages.shared"],
    ["stages"],
    ["run"],
    ["pipeline"],
    ["main", "__init__"],
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Within a level.
WITHIN = {("configfile", "config")}


def room_of(module: str) -> str:
    """The room of `smallcoder_jax.data.rows.packing`: its name, and the wing's where the room has wings."""
    parts = module.split(".")[1:] or ["__init__"]
    wing = ".".join(parts[:2])
    return wing if wing in LEVEL_OF else parts[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "smallcoder_jax":
                found |= {f"smallcoder_jax.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("smallcoder_jax.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.parts == ("data", "__init__.py"):  # of the wings
        assert not imports_of(path)
        return
    room = room_of(".".join(("smallcoder_jax", *relative.with_suffix("").parts)))
    assert room in LEVEL_OF, f"{relative}: a room that the design does not know"
    upward = [
        module
        for module in imports_of(path)
        if room_of(module) != room
        and LEVEL_OF[room_of(module)] >= LEVEL_OF[room]
        and (room, room_of(module)) not in WITHIN
    ]
    assert not upward, f"{relative} imports {upward}"


def reached(start: str) -> set[str]:
    """Every module of the package that importing `start` imports."""
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        path = PACKAGE.parent / Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in found or not file.is_file():
            continue
        found.add(module)
        waiting += imports_of(file)
    return found


STAGES = get_args(get_type_hints(StageConfig)["name"])


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_needs_another(stage: str) -> None:
    others = {f"smallcoder_jax.stages.{other}" for other in STAGES if other != stage}
    found = reached(f"smallcoder_jax.stages.{stage}")
    assert "smallcoder_jax.train.task" in found
    assert not found & others
    assert "smallcoder_jax.run" not in found


def test_there_is_one_loop_and_one_gradient() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in FILES}
    assert [name for name, text in sources.items() if "value_and_grad(" in text] == ["train/step.py"]
    assert [name for name, text in sources.items() if "train_step.lower(" in text] == ["train/loop.py"]
    for stage in STAGES:
        assert "optimizer.update" not in sources[f"stages/{stage}.py"]


def test_files_and_functions_are_short_enough_to_be_read() -> None:
    """What is longer wants a better idea."""
    long = [path.relative_to(ROOT).as_posix() for path in FILES if len(path.read_text().splitlines()) > 450]
    assert not long
    assert len((PACKAGE / "train" / "loop.py").read_text().splitlines()) < 350
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in [*FILES, *(ROOT / "tools").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and node.end_lineno is not None and node.end_lineno - node.lineno >= 60
    ]
    assert not functions


def test_every_command_shows_text_through_the_one_function_that_makes_it_visible() -> None:
    # What another program reads is printed as it is: shell and JSON. The sandbox's own files import nothing.
    as_it_is = {
        "smallcoder_jax/base/display.py",
        "launch/platforms.py",
        "launch/kubernetes.py",
        "tools/bench/attention_torch.py",
    }
    printing = {
        path.relative_to(ROOT).as_posix()
        for path in [*FILES, *(ROOT / "tools").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == as_it_is


def test_every_command_parses_its_flags_alike() -> None:
    # launch.platforms runs without the package.
    found = {
        path.relative_to(ROOT).as_posix()
        for path in [*FILES, *(ROOT / "tools").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
        if "argparse.ArgumentParser(" in path.read_text().replace("class ArgumentParser(argparse.ArgumentParser)", "")
    }
    assert found == {"launch/platforms.py"}


def test_a_higher_room_would_be_noticed(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("from smallcoder_jax.train import loop\nimport smallcoder_jax.run\n")
    assert imports_of(probe) == {"smallcoder_jax.train", "smallcoder_jax.run"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_touches_no_device_and_nothing_heavy() -> None:
    code = (
        "import sys, smallcoder_jax\n"
        "print([m for m in ('jax', 'tensorflow', 'torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("flag", ["--help", "--list"])
def test_help_and_list_are_quick_and_load_no_model(flag: str) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['main', {flag!r}]\n"
        "try:\n    runpy.run_module('smallcoder_jax.main', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('LOADED', [m for m in ('jax', 'flax', 'tensorflow', 'torch') if m in sys.modules])"
    )
    start = time.monotonic()
    assert "LOADED []" in run_python(code)
    assert time.monotonic() - start < 10  # measured at 0.6 s; the promise is 3 s, the bound allows for a busy machine
