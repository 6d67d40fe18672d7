"""From a trained run to an exported folder and back, by the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import smallcoder_jax
from smallcoder_jax import run
from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.huggingface import parity
from tests.evaluate.conftest import small_config
from tools import export


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_run_to_export_to_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert export.main(["--checkpoint", str(trained / "run"), "--output", str(first), "--json"]) is None
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["largest_difference"] < 1e-4
    loaded, original = smallcoder_jax.load(first), smallcoder_jax.load(trained / "run")
    assert loaded.model == original.model
    np.testing.assert_array_equal(loaded.params["embed"]["embedding"], original.params["embed"]["embedding"])
    export.main(["--checkpoint", str(first), "--output", str(second)])
    assert contents(first) == contents(second)
    card = (first / "README.md").read_text()
    assert "| steps | 24 |" in card
    assert "| bits per byte of all held-out files, xz -9e, all in one |" in card
    assert "rows of the held-out files, or all if fewer |" in card
    assert "| unknown | 80 |" in card
    assert "| dir:code |" in card  # and not where it is on this machine
    assert "with the model it was made from" in card


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_model_of_mixed_products_agrees(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = small_config(trained)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, matmul="mixed"))
    run.train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["matmul"]["kind"] == "mixed"
    capsys.readouterr()
    export.main(["--checkpoint", str(tmp_path / "run"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["largest_difference"] < 1e-4


def test_step_dtype_and_no_check(trained: Path, tmp_path: Path) -> None:
    run = str(trained / "run")
    export.main(
        ["--checkpoint", run, "--step", "12", "--dtype", "bfloat16", "--skip-parity", "--output", str(tmp_path / "out")]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 12 |" in card
    assert "The weights are stored in bfloat16." in card
    assert "Parity: not checked." in card
    with pytest.raises(UserError, match="no checkpoint '13'"):
        export.main(["--checkpoint", run, "--step", "13"])


def test_a_model_without_ternary_weights_is_not_packed(trained: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(trained / "run"), "--output", str(tmp_path / "out"), "--weights", "packed"]
    with pytest.raises(UserError, match="only ternary weights can be packed, and this model has none"):
        export.main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_replaced_by_its_export(trained: Path) -> None:
    run = trained / "run"
    with pytest.raises(UserError, match="is no exported model, so it is not replaced"):
        export.main(["--checkpoint", str(run), "--skip-parity", "--output", str(run)])
    assert (run / "checkpoints").is_dir()


def test_a_folder_of_others_has_no_card_to_write_again(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export.main(["--checkpoint", str(trained / "run"), "--skip-parity", "--output", str(folder)])
    (folder / "export.json").unlink()
    with pytest.raises(UserError, match=r"has no export\.json"):
        export.main(["--checkpoint", str(folder)])


@pytest.mark.parametrize("damage", [None, "{", "[]"])
def test_a_run_without_its_config(damage: str | None, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((trained / "run" / "run.json").read_text())
    if damage is not None:
        (tmp_path / "config.json").write_text(damage)
    with pytest.raises(UserError, match="config"):
        smallcoder_jax.load(tmp_path)


def test_nothing_is_published_where_transformers_disagrees(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity.check, "__kwdefaults__", {**parity.check.__kwdefaults__, "tolerance": 0.0})
    monkeypatch.setattr(export, "sample_texts", list)
    with pytest.raises(CheckFailed, match="FAILED"):
        export.main(["--checkpoint", str(trained / "run"), "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_copied_alone_has_a_whole_card(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    hidden = trained / "elsewhere"

    def card(name: str) -> str:
        export.main(["--checkpoint", str(run), "--skip-parity", "--output", str(tmp_path / name)])
        return (tmp_path / name / "README.md").read_text()

    (trained / "data" / "tokens").rename(hidden)
    try:
        whole = card("whole")
        (run / "tokens.json").unlink()  # runs were once without
        known = card("known")
    finally:
        hidden.rename(trained / "data" / "tokens")
    assert card("found") == whole
    assert "not known" not in whole
    assert "| not known | not known |" in known
    assert "The licences of the documents are not recorded." in known
