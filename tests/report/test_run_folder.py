"""The run folder's JSON files and the comparison of identities."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax import config as config_module
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import write_json
from smallcoder_jax.report import run_folder
from smallcoder_jax.report.run_folder import RunFolder, check_allowed, compare_identity, split_allowed


def test_looking_creates_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.latest_chart.name == "training_latest.png"
    with pytest.raises(UserError, match=r"run\.json does not exist"):
        folder.read_run_json()
    assert not folder.path.exists()


HOLD = """
import pathlib, sys
from smallcoder_jax.report.run_folder import RunFolder
with RunFolder(pathlib.Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_it_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    environment = os.environ | {"PYTHONPATH": str(Path(run_folder.__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process trains in"), folder.locked():
            pytest.fail("two processes in one folder")
        other.kill()
    with folder.locked():
        assert folder.path.is_dir()


def test_a_folder_that_utf8_cannot_name_is_refused_before_it_is_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a\udcff")
    with pytest.raises(UserError, match="no name in UTF-8"), folder.locked():
        pytest.fail("made")
    assert not list(tmp_path.iterdir())


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="cannot be written"), RunFolder(tmp_path).locked():
        pass


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(UserError, match="another process trains in"), folder.locked():
        pytest.fail("two runs in one folder")
    with pytest.raises(ZeroDivisionError), folder.locked():
        raise ZeroDivisionError
    with folder.locked():
        assert (tmp_path / ".lock").exists()


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below_a_file = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"run cannot be written: .*Not a directory"), below_a_file.locked():
        pytest.fail("there is no folder")
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # stands for a file that this user may not open
    with pytest.raises(UserError, match="run cannot be written: "), RunFolder(tmp_path / "run").locked():
        pytest.fail("there is no lock")


def test_json_has_no_nan_and_takes_numpy(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": math.nan, "b": [np.float32(1.5), math.inf], "c": np.arange(2), "d": (1, True, None)})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "c": [0, 1], "d": [1, True, None]}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"version": 1})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"version": 2})
    assert json.loads(path.read_text()) == {"version": 1}


def test_identity_differences_are_named_by_their_path() -> None:
    recorded = {
        "data": {"fingerprint": "aa", "sources": {"stdlib": 1.0}},
        "packer": "concat",
        "old": 1,
        "rate": math.nan,
    }
    current = {"data": {"fingerprint": "bb", "sources": {"stdlib": 1.0}}, "packer": "concat", "new": {"x": 2}}
    assert compare_identity(recorded, current | {"rate": math.nan}) == [
        "data.fingerprint: the run has 'aa', now 'bb'",
        "new.x: absent in the run, now 2",
        "old: the run has 1, now absent",
    ]


def test_an_identity_that_went_through_json_compares_equal(tmp_path: Path) -> None:
    identity = {"sources": ("a", "b"), "layers": {0: np.int64(3)}, "weight": 0.1}
    write_json(tmp_path / "a.json", identity)
    assert compare_identity(json.loads((tmp_path / "a.json").read_text()), identity) == []


@pytest.mark.parametrize("damaged", [[], "text", None, 3])
def test_an_identity_that_is_no_object_is_refused(damaged: object) -> None:
    with pytest.raises(UserError, match=f"a {type(damaged).__name__} is recorded"):
        compare_identity(damaged, {"data": "aa"})


def test_run_json_keeps_every_start_and_what_others_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run_json({"data": "aa"}, {"attention": "xla"})
    folder.update_run_json(tensorboard="on")
    folder.write_run_json({"data": "aa"}, {"attention": "xla"})
    content = folder.read_run_json()
    assert content["identity"] == {"data": "aa"}
    assert content["tensorboard"] == "on"
    assert content["attention"] == "xla"
    assert len(content["starts"]) == 2
    assert content["versions"]["jax"]
    assert content["device"]["count"] >= 1
    assert "python" in content["command"] or "pytest" in content["command"]


def test_damaged_run_json_is_one_message(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.run_json.write_text('{"identity": ')
    with pytest.raises(UserError, match="cannot be read"):
        folder.read_run_json()
    folder.run_json.write_text("[]")
    with pytest.raises(UserError, match="holds a list, not a JSON object"):
        folder.read_run_json()


def test_config_comes_back(tmp_path: Path) -> None:
    config = config_module.Config(name="nano")
    RunFolder(tmp_path).write_config(config)
    assert config_module.from_config_dict(json.loads(RunFolder(tmp_path).config_json.read_text())) == config


def test_training_info(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run_folder.write_training_info(
        folder,
        variant_name="nano",
        parameters=4_194_304,
        dataset="stdlib",
        config=config_module.Config(),
        steps=10,
        tokens_seen=1000,
        train_seconds=1.5,
        final_train_loss=math.nan,
        best_val_loss=2.5,
        best_step=5,
        skipped_updates=1,
        dummy_data=True,
        started_from=None,
    )
    info = json.loads(folder.training_info_json.read_text())
    assert info["parameters_m"] == 4.194
    assert info["final_train_loss"] is None
    assert info["dummy_data"] is True
    assert info["config"]["model"]["width"] == 768


def test_what_is_allowed_to_differ_is_named_by_key_or_by_section() -> None:
    lines = ["data.seed: the run has 1, now 2", "data.seeds: absent in the run, now 3", "model.width: the run has 8"]
    assert split_allowed(lines, ()) == (lines, [])
    assert split_allowed(lines, ("data.seed",)) == (lines[1:], lines[:1])
    assert split_allowed(lines, ("data", "mod")) == (lines[2:], lines[:2])


def test_a_key_that_may_differ_has_to_exist() -> None:
    identity = {"data": {"seed": 1}, "steps": 10}
    check_allowed(("data", "data.seed", "steps"), identity)
    with pytest.raises(UserError, match=r"--allow-changed=data\.seeds: .*did you mean 'data\.seed'\?"):
        check_allowed(("data.seeds",), identity)
    identity = {"train": {"seed": 1, "batch_size": 8}, "optimizer": {"learning_rate": 0.1}, "steps": 10}
    for given, meant in (("train.steps", "steps"), ("train.learning_rate", "optimizer.learning_rate")):
        with pytest.raises(UserError, match=rf"did you mean '{meant}'\?"):
            check_allowed((given,), identity)
