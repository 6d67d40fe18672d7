"""The commands and byte-level models: export, load, generate, evaluate, and train again; float and packed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import smallcoder_jax
from smallcoder_jax import run
from smallcoder_jax.huggingface import record
from tests.huggingface.hnet_models import FLAT
from tests.models.test_hnet import config_of
from tools import export, generate

pytestmark = pytest.mark.usefixtures("standard_promotion")
MODEL = dataclasses.replace(FLAT, context=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `code`, `data`, a run of 4 steps, `run`, and its packed export `packed`."""
    root = tmp_path_factory.mktemp("commands")
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(config_of(root, MODEL, steps=4), root / "run")
    arguments = ["--checkpoint", str(root / "run"), "--output", str(root / "packed"), "--weights", "packed"]
    export.main([*arguments, "--skip-parity"])
    return root


def test_a_packed_export_is_loaded_generates_and_is_evaluated(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, packed = (smallcoder_jax.load(root / name) for name in ("run", "packed"))
    options = {"max_tokens": 8, "temperature": 0.0}
    assert packed.generate("def ", **options)[0].token_ids == original.generate("def ", **options)[0].token_ids
    capsys.readouterr()
    generate.main(["--checkpoint", str(root / "packed"), "--prompt", "def ", "--max-tokens", "8", "--temperature", "0"])
    assert original.generate("def ", **options)[0].text in capsys.readouterr().out
    config = config_of(root, MODEL, steps=4)
    found = [run.evaluate_run(root / name, config)["loss"] for name in ("run", "packed")]
    assert found[0] == found[1]


def test_a_packed_export_is_written_again_and_as_float(root: Path, tmp_path: Path) -> None:
    for name, arguments in (("again", []), ("float", ["--weights", "float"])):
        export.main(
            ["--checkpoint", str(root / "packed"), "--output", str(tmp_path / name), "--skip-parity", *arguments]
        )
    for path in (root / "packed").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert record.read(tmp_path / "float").weights == "float"
    both = [smallcoder_jax.load(each).params for each in (root / "packed", tmp_path / "float")]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *both)))


def test_a_packed_export_is_trained_further(root: Path, tmp_path: Path) -> None:
    config = config_of(root, MODEL, steps=4)
    config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, start=str(root / "packed")))
    outcome = run.train(config, tmp_path / "run")
    before = run.evaluate_run(root / "run", config)["loss"]
    assert outcome.evaluation["loss"] < before


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float", "packed"])
def test_the_command_compares_it_in_transformers(
    weights: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(root / "run"), "--output", str(tmp_path / "out"), "--weights", weights]
    export.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["tolerance"] == 1e-9
    assert "loaded in `transformers` in float64" in (tmp_path / "out" / "README.md").read_text()
