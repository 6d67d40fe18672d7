"""Each way in which a run can fail to be what it says it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from smallcoder_jax.config import from_config_dict
from smallcoder_jax.evaluate.verify import Verdict, verify
from smallcoder_jax.models import build
from smallcoder_jax.run import reevaluate
from smallcoder_jax.train import checkpoint
from smallcoder_jax.train.checkpoint import Checkpointer
from smallcoder_jax.train.guard import init_guard
from smallcoder_jax.train.state import TrainState
from tests.helpers import FLOAT32
from tools import verify_models


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, to be damaged; the data it points to are put back afterwards."""
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    shutil.copytree(trained / "data", tmp_path / "kept")
    yield tmp_path / "run"
    shutil.rmtree(trained / "data")
    shutil.copytree(tmp_path / "kept", trained / "data")


def newest(run: Path) -> Path:
    return run / "checkpoints" / "24"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def seal(step: Path) -> None:
    """Makes the checksums those of what is there now, as someone who knows about them would."""
    change(step / checkpoint.MANIFEST, files=checkpoint.checksums(step))


def test_a_true_run_is_verified(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = verify(trained / "run", reevaluate)
    assert verdict.status == "verified", verdict.reason
    assert (verdict.run, verdict.step) == (str(trained / "run"), 24)
    assert verdict.bits_per_byte == pytest.approx(verdict.recorded_bits_per_byte, rel=1e-4)
    assert verdict.untrained_bits_per_byte == pytest.approx(8.0, abs=0.1)
    assert verdict.bits_per_byte is not None
    assert verdict.bits_per_byte < 4
    monkeypatch.chdir(trained)  # a path that is not absolute
    assert verify(Path("run"), reevaluate, batches=1).recorded_bits_per_byte is None


def test_not_found(tmp_path: Path) -> None:
    assert verify(tmp_path / "nowhere", reevaluate).status == "not_found"
    (tmp_path / "SmallCoder-verified").mkdir()
    assert verify(tmp_path / "SmallCoder-verified", reevaluate).status == "not_found"


def test_no_checkpoint(copied: Path) -> None:
    for step in ("12", "24"):
        (copied / "checkpoints" / step / checkpoint.MANIFEST).unlink()
    assert verify(copied, reevaluate).status == "no_checkpoint"


def test_a_flipped_bit_is_corrupt(copied: Path) -> None:
    largest = max(newest(copied).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    verdict = verify(copied, reevaluate)
    assert verdict.status == "corrupt"
    assert largest.name in verdict.reason


def test_a_removed_file_is_corrupt(copied: Path) -> None:
    (newest(copied) / "data.json").unlink()
    assert verify(copied, reevaluate).status == "corrupt"


def other_weights(copied: Path, scale: float) -> None:
    """Replaces the newest checkpoint by one of the same shape, with checksums that hold."""
    config = from_config_dict(json.loads((copied / "config.json").read_text()))
    meta = json.loads((newest(copied) / "meta.json").read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"model": build.abstract_model(config.model, FLOAT32)[1]}
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params, _ = checkpoint.load_params(newest(copied), placed)
    fresh = {"model": build.init_params(config.model, FLOAT32, jax.random.key(3))}
    mixed = jax.tree.map(lambda old, new: (1 - scale) * old + scale * new, params, fresh)
    shutil.rmtree(newest(copied))
    step, key = jax.numpy.int32(24), jax.random.key_data(jax.random.key(0))
    saver = Checkpointer(copied / "checkpoints", keep=9)
    saver.save(TrainState(step, mixed, {"none": step}, key, init_guard()), meta, None)
    saver.wait()
    assert not checkpoint.verify_step(newest(copied))


def test_other_weights_than_those_evaluated_are_corrupt(copied: Path) -> None:
    other_weights(copied, 0.2)
    verdict = verify(copied, reevaluate)
    assert verdict.status == "corrupt"
    assert "not the weights that were evaluated" in verdict.reason


def test_untrained_weights_are_an_error(copied: Path) -> None:
    other_weights(copied, 1.0)
    verdict = verify(copied, reevaluate)
    assert verdict.status == "error"
    assert "where an untrained model has 8." in verdict.reason


def test_dummy_data_is_wrong_data(copied: Path) -> None:
    change(newest(copied) / "meta.json", dummy_data=True)
    seal(newest(copied))
    assert verify(copied, reevaluate).status == "wrong_data"
    assert "stand-in" in verify(copied, reevaluate).reason


def test_a_borrowed_run_json_is_wrong_data(copied: Path) -> None:
    identity = json.loads((copied / "run.json").read_text())["identity"]
    identity["train"]["seed"] = 77
    change(copied / "run.json", identity=identity)
    verdict = verify(copied, reevaluate)
    assert verdict.status == "wrong_data"
    assert "train.seed: the run has 77, now 0" in verdict.reason


def test_other_shards_behind_the_same_manifest_are_wrong_data(trained: Path, copied: Path) -> None:
    shard = next((trained / "data" / "tokens").glob("*/*train*.array_record"))
    other = next((trained / "data" / "tokens").glob("*/*validation*.array_record"))
    shutil.copy(other, shard)
    verdict = verify(copied, reevaluate)
    assert verdict.status == "wrong_data"
    assert f"{shard} has 131,072 bytes, the manifest says 196,608" in verdict.reason
    # As someone who knows about checksums would leave it.
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    change(
        shard.parent / "manifest.json",
        checksums={**manifest["checksums"], shard.name: manifest["checksums"][other.name]},
    )
    verdict = verify(copied, reevaluate)
    assert verdict.status == "wrong_data"
    assert "changed since training" in verdict.reason


def test_missing_shards_tokens_and_tokenizer_are_wrong_data(trained: Path, copied: Path) -> None:
    next((trained / "data" / "tokens").glob("*/*validation*.array_record")).unlink()
    assert "does not exist" in verify(copied, reevaluate).reason
    shutil.rmtree(trained / "data" / "tokens")
    verdict = verify(copied, reevaluate)
    assert verdict.status == "wrong_data"
    assert "no prepared data under" in verdict.reason
    shutil.rmtree(copied / "tokenizer")
    verdict = verify(copied, reevaluate)
    assert verdict.status == "wrong_data"
    assert f"the run's tokenizer is gone: {copied / 'tokenizer'} does not exist" in verdict.reason


def test_a_run_and_its_data_are_verified_wherever_they_are(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "runs").mkdir(parents=True)
    shutil.copytree(trained / "run", tmp_path / "there" / "runs" / "run", symlinks=True)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "there" / "runs" / "run"
    aside = trained / "data"
    aside.rename(tmp_path / "moved")
    try:
        verdict = verify(run, reevaluate)
        assert verdict.status == "wrong_data"
        assert "name the folder that holds it with --data" in verdict.reason
        assert verify_models.main(["--run", str(run), "--data", str(tmp_path / "moved")]) is None
        (tmp_path / "there" / "data").symlink_to(tmp_path / "moved")  # as far from the run as it was
        (run / "run.json").write_text((run / "run.json").read_text().replace('"../data"', '"../../data"'))
        assert verify(run, reevaluate).status == "verified"
    finally:
        (tmp_path / "moved").rename(aside)
    assert str(trained) not in json.dumps({**json.loads((run / "run.json").read_text()), "identity": 0, "dataset": 0})


def test_a_changed_tokenizer_is_wrong_data(copied: Path) -> None:
    change(newest(copied) / "meta.json", tokenizer_hash="0" * 64)
    seal(newest(copied))
    verdict = verify(copied, reevaluate)
    assert verdict.status == "wrong_data"
    assert "is not the one that the run was trained with" in verdict.reason


def test_what_cannot_be_read_is_an_error(copied: Path) -> None:
    kept = (copied / "run.json").read_text()
    for content in ("{", "[]", json.dumps({**json.loads(kept), "identity": []})):
        (copied / "run.json").write_text(content)
        assert verify(copied, reevaluate).status == "error"
    (copied / "run.json").write_text(kept)
    meta = json.loads((newest(copied) / "meta.json").read_text())
    for damaged in ([], {**meta, "identity": []}, {**meta, "leaves": []}):
        (newest(copied) / "meta.json").write_text(json.dumps(damaged))
        seal(newest(copied))
        assert verify(copied, reevaluate).status == "error"


def test_a_manifest_of_another_form_is_corrupt(copied: Path) -> None:
    change(newest(copied) / checkpoint.MANIFEST, files=[])
    assert verify(copied, reevaluate).status == "corrupt"


def test_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from smallcoder_jax.base.errors import CheckFailed, UserError

    assert verify_models.main(["--all", "--runs", str(trained), "--json"]) is None
    (shown,) = json.loads(capsys.readouterr().out)
    assert Verdict(**shown).status == "verified"
    with pytest.raises(CheckFailed, match=r"1 of 2 not verified: .*nowhere"):
        verify_models.main(["--run", str(trained / "run"), "--run", str(tmp_path / "nowhere"), "--batches", "1"])
    assert "not_found" in capsys.readouterr().out
    with pytest.raises(UserError, match="no run under"):
        verify_models.main(["--all", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit):
        verify_models.main(["--run", "x", "--batches", "0"])
