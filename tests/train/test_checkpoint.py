"""Checkpoints: what is saved comes back, on any mesh; what is damaged or half-written is refused or removed."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smallcoder_jax.base.errors import Interrupted, UserError
from smallcoder_jax.base.faults import flip_bit
from smallcoder_jax.config import MeshConfig
from smallcoder_jax.mesh import make_mesh
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder.sharding import RULES
from smallcoder_jax.train import checkpoint
from smallcoder_jax.train.checkpoint import MANIFEST, Checkpointer, find_step, load_params, verify_step
from smallcoder_jax.train.guard import init_guard
from smallcoder_jax.train.state import TrainState, state_sharding
from tests.helpers import FLOAT32, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = tiny_model(vocab_size=128)
ONE_DEVICE = MeshConfig()
META = {"config": {"name": "tiny"}, "tokens_seen": 7}
DATA_STATE = {"documents": {"next_index": 12}, "offset": 5}


def state_at(step: int, seed: int = 0) -> TrainState:
    """A state with other numbers in every leaf, on the default device."""
    abstract = {"model": build.abstract_model(MODEL, FLOAT32)[1]}
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), abstract)
    moments = jax.tree.map(lambda leaf: leaf * 0.5, optax.scale_by_adam().init(params)._replace(mu=params, nu=params))
    return TrainState(jnp.int32(step), params, moments, jax.random.key_data(jax.random.key(seed)), init_guard())


def abstract_of(state: TrainState, mesh_config: MeshConfig = ONE_DEVICE, devices: int = 1) -> TrainState:
    mesh = make_mesh(mesh_config, MODEL, 8, jax.devices()[:devices])
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_sharding(mesh, state, RULES),
    )


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(folder: Path, *steps: int, keep: int = 3, best: int | None = None) -> Checkpointer:
    checkpointer = Checkpointer(folder, keep)
    for step in steps:
        checkpointer.save(state_at(step, seed=step), META, DATA_STATE, best=step == best)
    checkpointer.wait()
    return checkpointer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step 2. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        save(folder, 2)
    return folder


@pytest.mark.parametrize(
    ("mesh", "devices"), [(ONE_DEVICE, 1), (MeshConfig(data=1, fsdp=8), 8), (MeshConfig(fsdp=2, tensor=2), 8)]
)
def test_everything_comes_back_onto_any_mesh(saved: Path, mesh: MeshConfig, devices: int) -> None:
    expected = state_at(2, seed=2)
    wanted = abstract_of(expected, mesh, devices)
    restored = Checkpointer(saved, 3).restore(2, wanted)
    assert_equal(restored.state, expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored.state, wanted))
    assert restored.data_state == DATA_STATE
    assert restored.meta["tokens_seen"] == 7
    assert restored.meta["step"] == 2


def test_a_split_state_comes_back_onto_one_device(tmp_path: Path) -> None:
    expected = state_at(3, seed=1)
    wanted = abstract_of(expected, MeshConfig(data=1, fsdp=8), 8)
    split = jax.device_put(expected, jax.tree.map(lambda leaf: leaf.sharding, wanted))
    checkpointer = Checkpointer(tmp_path, 1)
    checkpointer.save(split, META, DATA_STATE)
    checkpointer.wait()
    assert_equal(checkpointer.restore(3, abstract_of(expected)).state, expected)


def test_parameters_alone(saved: Path) -> None:
    expected = state_at(2, seed=2)
    params, meta = load_params(find_step(saved, 2), abstract_of(expected).params)
    assert_equal(params, expected.params)
    assert meta["config"] == META["config"]


def test_the_newest_steps_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert checkpointer.steps() == [2, 4, 5]
    assert checkpointer.best() == 2
    assert find_step(tmp_path, None) == (tmp_path / "2").resolve()
    assert find_step(tmp_path, "best") == (tmp_path / "2").resolve()
    assert find_step(tmp_path, 4) == tmp_path / "4"
    with pytest.raises(UserError, match=r"no checkpoint '3' under .*; there are: 2, 4, 5"):
        find_step(tmp_path, 3)
    checkpointer.save(state_at(6), META, DATA_STATE, best=True)
    checkpointer.wait()
    assert checkpointer.steps() == [5, 6]
    assert checkpointer.best() == 6


def test_a_step_that_is_saved_already_can_become_the_best(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 1, 2)
    before = (tmp_path / "1" / MANIFEST).read_bytes()
    checkpointer.save(state_at(1, seed=9), META, DATA_STATE, best=True)
    checkpointer.wait()
    assert checkpointer.best() == 1
    assert (tmp_path / "1" / MANIFEST).read_bytes() == before


def test_a_flipped_bit_in_any_file_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    step = shutil.copytree(saved, tmp_path / "checkpoints") / "2"
    wanted = abstract_of(state_at(2))
    files = sorted(path for path in step.rglob("*") if path.is_file() and path != step / MANIFEST)
    assert {"meta.json", "data.json"} < {path.name for path in files}
    assert len(files) > 15
    for path in files:
        content = bytearray(path.read_bytes())
        if not content:
            continue
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert verify_step(step) == [f"{path}: content does not match its checksum"]
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert verify_step(step) == []
    big = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(big.read_bytes())
    content[-1] ^= 128
    big.write_bytes(content)
    for read in (
        lambda: Checkpointer(step.parent, 3).restore(2, wanted),
        lambda: load_params(step, wanted.params),
    ):
        with pytest.raises(UserError, match=f"is damaged:\n  .*{big.name}: content does not match its checksum"):
            read()


def test_truncated_missing_and_added_files_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    step = shutil.copytree(saved, tmp_path / "checkpoints") / "2"
    big = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = big.read_bytes()
    big.write_bytes(content[:-1])
    assert verify_step(step) == [f"{big}: content does not match its checksum"]
    big.unlink()
    assert verify_step(step) == [f"{big}: missing"]
    big.write_bytes(content)
    (step / "more").write_text("")
    assert verify_step(step) == [f"{step / 'more'}: not in the manifest"]
    (step / "more").unlink()
    assert verify_step(step) == []
    (step / MANIFEST).write_text("{")
    (problem,) = verify_step(step)
    assert problem.startswith(f"{step / MANIFEST}: unreadable")
    (step / MANIFEST).write_text('{"files": []}')
    assert verify_step(step) == [f"{step / MANIFEST}: unreadable ('files' is a list, not an object)"]
    (step / MANIFEST).unlink()
    assert verify_step(step) == [f"{step / MANIFEST}: missing, so the save was never finished"]


def test_an_empty_or_half_written_step_is_never_the_latest(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    (folder / "9").mkdir()
    shutil.copytree(folder / "2", folder / "7")
    (folder / "7" / MANIFEST).unlink()
    assert find_step(folder, None) == folder / "2"
    checkpointer = Checkpointer(folder, 3)
    assert checkpointer.steps() == [2]
    assert sorted(path.name for path in folder.iterdir()) == ["2"]
    (folder / "8").mkdir()  # while a run is at work
    assert checkpointer.steps() == [2]
    checkpointer.save(state_at(7, seed=7), META, DATA_STATE)
    checkpointer.wait()
    assert_equal(checkpointer.restore(7, abstract_of(state_at(7))).state, state_at(7, seed=7))


def test_what_is_not_a_step_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "backup" / "250").mkdir(parents=True)
    (tmp_path / "backup" / "250" / "mine").write_text("kept")
    (tmp_path / "7").mkdir()
    Checkpointer(tmp_path, 3)
    assert (tmp_path / "backup" / "250" / "mine").read_text() == "kept"
    assert not (tmp_path / "7").exists()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint under"):
        find_step(tmp_path, None)
    with pytest.raises(UserError, match="never finished"):
        Checkpointer(tmp_path / "other", 3).restore(3, abstract_of(state_at(3)))


def test_another_shape_or_dtype_is_named(saved: Path) -> None:
    wanted = abstract_of(state_at(2))
    name = "blocks/1/mlp/gate/kernel"

    def with_gate(**changes: Any) -> TrainState:
        gate = wanted.params["model"]["blocks"][1]["mlp"]["gate"]["kernel"]
        values = {"shape": gate.shape, "dtype": gate.dtype, "sharding": gate.sharding, **changes}
        params = jax.tree.map(lambda leaf: leaf, wanted.params)
        params["model"]["blocks"][1]["mlp"]["gate"]["kernel"] = jax.ShapeDtypeStruct(**values)
        return wanted._replace(params=params)

    for changes, given in (({"shape": (64, 98)}, r"\[64, 98\]"), ({"dtype": jnp.bfloat16}, "bfloat16")):
        with pytest.raises(UserError, match=rf"parameter '{name}' is .*\[64, 96\].*float32.* wants .*{given}"):
            Checkpointer(saved, 3).restore(2, with_gate(**changes))
    deeper = {"model": build.abstract_model(dataclasses.replace(MODEL, layers=3), FLOAT32)[1]}
    with pytest.raises(UserError, match=r"parameter 'blocks/2/\S+' is absent in the file"):
        load_params(saved / "2", deeper)


@pytest.mark.parametrize("where", ["meta", "orbax", "manifest"])
def test_a_full_disk_is_one_message_and_the_earlier_step_stays(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = save(tmp_path, 1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_json = checkpoint.write_json

    class Response:
        def result(self) -> None:
            raise full

    def write(path: Path, value: Any) -> None:
        if path.name == {"meta": "meta.json", "manifest": MANIFEST}.get(where):
            raise full
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", write)
        if where == "orbax":
            patch.setattr(checkpoint.ocp, "save_checkpointables_async", lambda *_: Response())

        def save_and_wait() -> None:
            checkpointer.save(state_at(2, seed=2), META, DATA_STATE)
            checkpointer.wait()

        with pytest.raises(UserError, match=r"could not save a checkpoint .*No space left on device.* are intact"):
            save_and_wait()
    assert checkpointer.steps() == [1]
    again = Checkpointer(tmp_path, 3)
    assert_equal(again.restore(1, abstract_of(state_at(1))).state, state_at(1, seed=1))
    again.save(state_at(2, seed=2), META, DATA_STATE)
    again.wait()
    assert_equal(again.restore(2, abstract_of(state_at(2))).state, state_at(2, seed=2))


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "what it was"), MemoryError("what it was"), KeyError("what it was")]
)
def test_the_next_call_raises_what_a_save_in_the_background_raised(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = save(tmp_path, 1)

    def fail(folder: Path) -> Any:
        raise error

    monkeypatch.setattr(checkpoint, "checksums", fail)
    checkpointer.save(state_at(2), META, DATA_STATE)
    with pytest.raises(UserError, match=rf"{type(error).__name__}: .*what it was"):
        checkpointer.save(state_at(3), META, DATA_STATE)
    checkpointer.check()  # said once
    assert json.loads((tmp_path / "1" / MANIFEST).read_text())["format"] == 1


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        flip_bit(path)
    elif how == "truncated":
        largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    elif how == "missing":
        (path / "meta.json").unlink()
    elif how == "emptied":
        shutil.rmtree(path / "state")
    else:
        (path / MANIFEST).write_text("{")


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "emptied", "unreadable"])
def test_the_newest_sound_step_is_used_and_a_damaged_one_named(how: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "3", how)
    checkpointer, notes = Checkpointer(tmp_path, 2), []
    restored = checkpointer.restore_newest(abstract_of(state_at(1)), lambda meta: None, notes.append)
    assert restored is not None
    assert_equal(restored.state, state_at(2, seed=2))
    assert len(notes) == 1
    assert f"checkpoint {tmp_path / '3'} is damaged" in notes[0]
    checkpointer.save(state_at(3, seed=3), META, DATA_STATE)  # the run comes to it again
    checkpointer.wait()
    assert (tmp_path / "3.damaged").is_dir()
    assert checkpointer.steps() == [2, 3]
    assert_equal(checkpointer.restore(3, abstract_of(state_at(3))).state, state_at(3, seed=3))


def test_a_damaged_step_does_not_count_among_those_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 9)
    damage(tmp_path / "9", "flipped")
    checkpointer = Checkpointer(tmp_path, 2)
    assert checkpointer.restore_newest(abstract_of(state_at(1)), lambda meta: None, lambda text: None) is not None
    checkpointer.save(state_at(3), META, DATA_STATE)
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3, 9]  # 1 had to go, 9 is not counted


def test_no_sound_step_is_an_error_and_no_step_at_all_is_none(tmp_path: Path) -> None:
    wanted = abstract_of(state_at(1))
    assert Checkpointer(tmp_path / "new", 3).restore_newest(wanted, lambda meta: None, lambda text: None) is None
    save(tmp_path / "old", 1, 2)
    for step in ("1", "2"):
        damage(tmp_path / "old" / step, "flipped")
    with pytest.raises(UserError, match=r"no checkpoint under .* is sound:(.|\n)*2 is damaged(.|\n)*1 is damaged"):
        Checkpointer(tmp_path / "old", 3).restore_newest(wanted, lambda meta: None, lambda text: None)


def save_evaluated(folder: Path, losses: dict[int, float | None], keep: int = 9) -> Checkpointer:
    """Steps with a validation loss or, None, with what the evaluation before them left."""
    checkpointer, evaluation, best = Checkpointer(folder, keep), {}, float("inf")
    for step, loss in losses.items():
        evaluation = evaluation if loss is None else {"loss": loss}
        is_best = loss is not None and loss < best
        best = min(best, loss if loss is not None else best)
        meta = {**META, "evaluation": evaluation, "best_loss": best if np.isfinite(best) else None}
        checkpointer.save(state_at(step, seed=step), meta, DATA_STATE, best=is_best)
    checkpointer.wait()
    return checkpointer


def test_the_best_step_is_what_was_recorded_however_the_link_was_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_evaluated(folder, {1: None, 2: 3.0, 3: None, 4: 2.0, 5: None, 6: 2.5})
    link = folder / "best"
    shutil.copytree(folder / "6", tmp_path / "other" / "6")

    def again(to: str | None) -> None:
        shutil.rmtree(link) if link.is_dir() and not link.is_symlink() else link.unlink(missing_ok=True)
        if to is not None:
            link.symlink_to(to)

    for to in ("4", "2", None, "99", "../other/6", str(tmp_path / "other" / "6"), "best", "4\n"):
        again(to)  # "2": killed between the manifest of 4 and the link
        assert find_step(folder, None) == find_step(folder, "best") == folder / "4"
        assert Checkpointer(folder, 3).best() == 4
        assert os.readlink(link) == "4"
    again(None)
    shutil.copytree(folder / "2", link)  # a copy that followed links
    assert find_step(folder, "best") == folder / "4"
    assert Checkpointer(folder, 3).best() == 4
    assert (folder / "best.copied" / MANIFEST).is_file()
    (folder / "4" / "meta.json").write_text("{")  # whoever loads it is told, and not given another
    assert find_step(folder, "best") == folder / "4"


def test_a_link_is_no_step(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    (folder / "9").symlink_to(saved / "2")
    (folder / "007").mkdir()
    (folder / "8" / MANIFEST).mkdir(parents=True)
    assert checkpoint.complete_steps(folder) == [2]
    assert find_step(folder, None) == folder / "2"
    with pytest.raises(UserError, match="no checkpoint '9'"):
        find_step(folder, 9)
    assert Checkpointer(folder, 3).steps() == [2]
    assert (saved / "2" / MANIFEST).is_file()


def test_swapped_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for name, other in (("1", "3"), ("2", "1"), ("3", "2")):
        (tmp_path / name).rename(tmp_path / other)
    checkpointer, notes = Checkpointer(tmp_path, 3), []
    with pytest.raises(
        UserError, match=r"no checkpoint under .* is sound:(.|\n)*it is of step 1: the folder was renamed"
    ):
        checkpointer.restore_newest(abstract_of(state_at(1)), lambda meta: None, notes.append)
    with pytest.raises(UserError, match=r"1/meta.json: it is of step 2"):
        load_params(find_step(tmp_path, 1), abstract_of(state_at(1)).params)
    # As someone who knows about checksums would leave it.
    meta = tmp_path / "2" / "meta.json"
    meta.write_text(meta.read_text().replace('"step": 1', '"step": 2'))
    (tmp_path / "2" / MANIFEST).write_text(json.dumps({"format": 1, "files": checkpoint.checksums(tmp_path / "2")}))
    with pytest.raises(UserError, match="holds the state of step 1"):
        checkpointer.restore(2, abstract_of(state_at(1)))


def test_a_save_may_replace_none(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 1, 2, keep=1)
    assert checkpointer.steps() == [2]
    for step, keep in ((3, 0), (4, 2), (5, None)):
        checkpointer.save(state_at(step), META, DATA_STATE, keep=keep)
        checkpointer.wait()
        assert checkpointer.steps() == {3: [2, 3], 4: [3, 4], 5: [5]}[step]


@pytest.mark.parametrize("value", ["Infinity", "NaN", '"3"', "null", "1e400", "[" * 100_000])
def test_a_step_that_is_no_number_is_named(value: str, saved: Path, tmp_path: Path) -> None:
    step = shutil.copytree(saved, tmp_path / "checkpoints") / "2"
    (step / "meta.json").write_text((step / "meta.json").read_text().replace('"step": 2', f'"step": {value}'))
    (step / MANIFEST).write_text(json.dumps({"format": 1, "files": checkpoint.checksums(step)}))
    with pytest.raises(UserError, match=r"meta\.json"):
        load_params(step, abstract_of(state_at(2)).params)
    with pytest.raises(UserError, match=r"meta\.json"):
        Checkpointer(step.parent, 3).restore_newest(abstract_of(state_at(2)), lambda meta: None, lambda text: None)


@pytest.mark.parametrize("signalled", [KeyboardInterrupt, Interrupted])
def test_an_interrupt_while_arrays_are_read_stays_one(
    signalled: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:  # as Orbax does
        try:
            raise signalled
        except BaseException as error:
            raise RuntimeError("could not load") from error

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    with pytest.raises(signalled):
        load_params(saved / "2", abstract_of(state_at(2)).params)
    with pytest.raises(signalled):
        Checkpointer(saved, 3).restore(2, abstract_of(state_at(2)))


def test_orbax_and_its_threads_tell_nothing_beside_the_error(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    show = checkpoint._without_closed_loops(lambda unraisable: heard.append(str(unraisable.exc_value)))
    for text in ("Event loop is closed", "something else"):
        show(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert heard == ["something else"]
    for name, path, text in (
        ("absl", "/site/orbax/checkpoint/_src/futures/future.py", "of Orbax"),
        ("absl", "/site/grain/here.py", "of another"),
        ("asyncio", "/lib/asyncio/base_events.py", "task: coro=<run_sync() running at /site/orbax/utils.py:1>"),
    ):
        logging.getLogger(name).handle(logging.LogRecord(name, logging.ERROR, path, 1, text, None, None))
    assert [record.getMessage() for record in caplog.records] == ["of another"]
