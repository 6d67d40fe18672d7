"""Commands are found from anywhere, say what an environment lacks, and `make clean` deletes no model."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools

from smallcoder_jax.base import environment
from smallcoder_jax.base.errors import UserError
from tools import commands, quickstart, run_stages

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(("script", "target"), PROJECT["project"]["scripts"].items())
def test_every_script_is_a_command(
    script: str, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, name = target.partition(":")
    assert (module, script) == ("tools.commands", f"smallcoder-{name}")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(commands, name)()
    assert not ended.value.code
    assert "usage: " in capsys.readouterr().out


def test_an_installation_holds_the_commands_and_the_configs() -> None:
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    found = setuptools.find_namespace_packages(str(ROOT), include=include)
    assert {"smallcoder_jax.config", "smallcoder_jax.report.templates", "tools", "launch", "configs.stages"} <= set(
        found
    )
    assert not [name for name in found if name.startswith(("tests", "docs"))]


@pytest.mark.slow
def test_a_wheel_trains_outside_of_the_checkout(tmp_path: Path) -> None:
    """Built and installed into an environment that holds its dependencies and nothing else of this one."""
    one_device = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    environment = {**one_device, "JAX_PLATFORMS": "cpu"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    for name in ("smallcoder_jax", "tools", "launch", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    run([*wheel, str(copy)])
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")])
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    shutil.rmtree(copy)
    # A line of a .pth file names a folder; what the folder's own .pth files name, as this checkout, is left out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python, code = str(tmp_path / "venv" / "bin" / "python"), "import smallcoder_jax; print(smallcoder_jax.__file__)"
    assert run([python, "-c", code]).stdout.startswith(str(site))
    (tmp_path / "code").mkdir()
    for index in range(40):
        (tmp_path / "code" / f"{index}.py").write_text(f"def f{index}(x):\n    return x + {index}\n" * 40)
    values = {"data.sources": "dir:code", "tokenizer.kind": "bytes", "train.steps": 2, "eval.every": 2}
    values |= {"model.vocab_size": 256, "log.tensorboard": False, "eval.sample_tokens": 0, "optimizer.warmup_steps": 1}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    run([python, "-m", "smallcoder_jax.main", "--config=nano", "--workdir=run", *overrides])
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["identity"]["data"]["fingerprint"]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_every_dependency_is_asked_for_at_the_start() -> None:
    named = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in PROJECT["project"]["dependencies"]}
    imported = {"orbax_checkpoint": "orbax", "absl_py": "absl"}
    assert sorted(imported.get(name, name) for name in named) == sorted(environment.NEEDED)
    assert all(importlib.util.find_spec(name) for name in environment.NEEDED)


@pytest.mark.parametrize("command", ["smallcoder_jax.main", "tools.generate", "tools.quickstart", "launch.local"])
def test_without_the_environment_a_command_says_one_line(command: str) -> None:
    # -S: this Python without what is installed.
    done = subprocess.run([sys.executable, "-S", "-m", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: .* lacks jax, flax, optax and \d+ more packages; activate the environment .*\n", done.stderr
    )
    assert done.stdout == ""


def test_without_the_environment_an_import_raises() -> None:
    command = [sys.executable, "-S", "-c", "import smallcoder_jax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"\nImportError: .* lacks jax.*; activate the environment", done.stderr)


@pytest.mark.parametrize("main", [quickstart.main, run_stages.main])
def test_what_the_end_needs_is_asked_for_before_anything_runs(
    main: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    given = [f"--workdir={tmp_path / 'run'}", *(["--variant=nano"] if main is run_stages.main else [])]
    with pytest.raises(UserError, match=r"needs torch: pip install 'smallcoder_jax\[parity\]'"):
        main(given)
    assert not list(tmp_path.iterdir())


def test_make_clean_leaves_models_and_data(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (".venv", ".pytest_cache", "pkg/__pycache__", "runs/mine/__pycache__", "data/tokens"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def make(target: str, said: str = "") -> int:
        command = ["make", "-s", target]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, input=said, capture_output=True, text=True, check=False
        ).returncode

    def left() -> set[str]:
        return {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("file")}

    assert make("clean") == 0
    assert left() == {"runs/mine/__pycache__", "data/tokens"}
    for said in ("", "no\n", "y\n"):
        assert make("distclean", said) == 2
        assert left() == {"runs/mine/__pycache__", "data/tokens"}
    assert make("distclean", "yes\n") == 0
    assert left() == set()
