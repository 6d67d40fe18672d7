"""Checkpoints: the only user of Orbax.

    checkpoints/250/state/         Orbax: `params`, and `rest` (optimizer, step, RNG)
    checkpoints/250/meta.json      config, run identity, tokenizer hash, leaves, evaluation so far
    checkpoints/250/data.json      state of the data iterator, the same on all processes
    checkpoints/250/manifest.json  checksum of every other file, written last: without it the step does not exist
    checkpoints/best               link to the best step by validation loss

Orbax notices truncated and missing files, but loads flipped bits in silence: hence our own checksums, verified on
every load. They are computed on the thread that waits for the asynchronous save.

Of several processes each writes its part of the arrays, and process 0 everything else, once all parts are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from smallcoder_jax import distributed
from smallcoder_jax.errors import UserError
from smallcoder_jax.mesh import path_name
from smallcoder_jax.train.run_folder import read_json
from smallcoder_jax.train.state import TrainState

MANIFEST = "manifest.json"


class Restored(NamedTuple):
    state: TrainState
    meta: dict[str, Any]
    data_state: Any


class Checkpointer:
    """Saves without blocking, keeps the newest `keep` steps and the best one."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        distributed.from_first(self._make_room)

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():  # of a process that was killed while saving
            ours = leftover.name.isdecimal() and leftover.is_dir() and not leftover.is_symlink()
            if ours and not (leftover / MANIFEST).exists():
                shutil.rmtree(leftover)

    def save(self, state: TrainState, meta: dict[str, Any], data_state: Any, *, best: bool = False) -> None:
        """Starts saving `state` under its step. Raises what an earlier save raised.

        Returns when the arrays are copied from the device; `best` also makes this step the best one.
        """
        self.wait()
        step = int(state.step)
        target = self.folder / str(step)
        first = distributed.is_first()
        if distributed.from_first((target / MANIFEST).exists):  # saved already: only the mark is new
            if best and first:
                self._mark_best(step)
            return
        rest = {"optimizer": state.optimizer, "step": state.step, "key": state.key}
        try:
            if first:
                target.mkdir(parents=True, exist_ok=True)
                _write_json(target / "meta.json", {**meta, "step": step, "leaves": leaves_of(state.params)})
                _write_json(target / "data.json", data_state)
            response = ocp.save_checkpointables_async(_orbax_path(target), {"params": state.params, "rest": rest})
        except OSError as error:
            raise self._failure(error) from error

        def finish() -> None:
            try:
                response.result()  # of all processes: Orbax waits for the slowest before it ends on any
                if first:
                    _write_json(target / MANIFEST, {"format": 1, "files": checksums(target)})
                    if best:
                        self._mark_best(step)
                    self._prune()
            except BaseException as error:  # whatever it is: the next call on the main thread is all that can tell
                self._error = error

        self._thread = threading.Thread(target=finish, name=f"save-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save in flight. Raises UserError naming the cause when it failed (a full disk, for example)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises UserError when a save has failed, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failure(error) from error

    def steps(self) -> list[int]:
        """Complete steps, ascending, as process 0 sees them."""
        return distributed.from_first(self._steps)

    def _steps(self) -> list[int]:
        names = (path.name for path in self.folder.iterdir() if (path / MANIFEST).exists() and not path.is_symlink())
        return sorted(int(name) for name in names if name.isdecimal())

    def best(self) -> int | None:
        link = self.folder / "best"
        return int(os.readlink(link)) if link.is_symlink() else None

    def restore(
        self, step: int, abstract: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored:
        """The state of `step`, placed as the shardings in `abstract` say, after verifying every checksum.

        `check` is given meta.json before any array is read, and raises where the step is not wanted. Raises UserError
        naming the file when one does not match, or the parameter whose shape or dtype differs.
        """
        target = self.folder / str(step)
        distributed.from_first(lambda: verified(target) and None)
        meta = read_meta(target)
        check(meta)
        _check_leaves(meta["leaves"], leaves_of(abstract.params), target)
        rest = {"optimizer": abstract.optimizer, "step": abstract.step, "key": abstract.key}
        loaded = ocp.load_checkpointables(_orbax_path(target), {"params": abstract.params, "rest": rest})
        state = TrainState(loaded["rest"]["step"], loaded["params"], loaded["rest"]["optimizer"], loaded["rest"]["key"])
        return Restored(state, meta, read_json(target / "data.json", "the place of a checkpoint in the data"))

    def _failure(self, error: BaseException) -> BaseException:
        # Another process died while this one waited for it: nobody's mistake, and worth another try.
        if isinstance(error, TimeoutError | jax.errors.JaxRuntimeError):
            return error
        return UserError(
            f"could not save a checkpoint under {self.folder}: {type(error).__name__}: {error}. Free space or choose "
            "another --workdir; the steps saved before are intact and the same command continues from the newest"
        )

    def _mark_best(self, step: int) -> None:
        link = self.folder / "best.new"
        link.unlink(missing_ok=True)
        link.symlink_to(str(step))
        os.replace(link, self.folder / "best")

    def _prune(self) -> None:
        best = self.best()
        for step in self._steps()[: -self.keep]:
            if step != best:
                (self.folder / str(step) / MANIFEST).unlink()  # first: a half-removed step is no step
                shutil.rmtree(self.folder / str(step))


def find_step(folder: Path, step: int | str | None) -> Path:
    """The folder of `step` ('best', a number, or None: best if there is one, else newest) under a run's checkpoints.

    Raises UserError when there is none.
    """
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal() and (p / MANIFEST).exists())
    if not steps:
        raise UserError(f"no complete checkpoint under {folder}; train first, or name another run")
    if step in (None, "best") and (folder / "best" / MANIFEST).exists():
        return (folder / "best").resolve()
    if step is None:
        step = steps[-1]
    if not str(step).isdecimal() or int(step) not in steps:
        raise UserError(f"no checkpoint '{step}' under {folder}; there are: {', '.join(map(str, steps))}")
    return folder / str(step)


def load_params(step_folder: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Only the parameters of a step, verified, and its meta.json. `abstract` as in `Checkpointer.restore`."""
    target = verified(step_folder)
    meta = read_meta(target)
    _check_leaves(meta["leaves"], leaves_of(abstract), target)
    return ocp.load_checkpointables(_orbax_path(target), {"params": abstract})["params"], meta


def read_meta(step_folder: Path) -> dict[str, Any]:
    """The content of a step's meta.json. Raises UserError if it is missing, damaged or of another form."""
    path = step_folder / "meta.json"
    what = "what a checkpoint says of itself, with its leaves"
    meta = read_json(path, what)
    if not isinstance(meta, dict) or not isinstance(meta.get("leaves"), dict):
        raise UserError(f"{path} is not of the form that was written; expected {what}")
    return meta


def verify_step(step_folder: Path) -> list[str]:
    """What is wrong with the files of a step, one line each; empty when every checksum matches."""
    manifest = step_folder / MANIFEST
    if not manifest.exists():
        return [f"{manifest}: missing, so the save was never finished"]
    try:
        recorded = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{manifest}: unreadable ({error})"]
    if not isinstance(recorded, dict):
        return [f"{manifest}: unreadable ('files' is a {type(recorded).__name__}, not an object)"]
    found = checksums(step_folder)
    problems = [f"{step_folder / name}: missing" for name in sorted(recorded.keys() - found.keys())]
    problems += [f"{step_folder / name}: not in the manifest" for name in sorted(found.keys() - recorded.keys())]
    changed = sorted(name for name in recorded.keys() & found.keys() if recorded[name] != found[name])
    return problems + [f"{step_folder / name}: content does not match its checksum" for name in changed]


def verified(step_folder: Path) -> Path:
    """The folder itself once every checksum holds; raises UserError otherwise."""
    problems = verify_step(step_folder)
    if problems:
        raise UserError(f"checkpoint {step_folder} is damaged:\n  " + "\n  ".join(problems))
    return step_folder


def checksums(step_folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a step but its manifest, by relative path."""
    files = sorted(path for path in step_folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files += sorted(path for path in (step_folder / "state").rglob(MANIFEST) if path.is_file())

    def one(path: Path) -> tuple[str, dict[str, Any]]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return path.relative_to(step_folder).as_posix(), {"bytes": path.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(one, files))


def leaves_of(tree: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype] of every array: Orbax casts a wrong dtype in silence, so we compare ourselves."""
    return {
        path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_leaves(saved: dict[str, list[Any]], wanted: dict[str, list[Any]], target: Path) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {target}: parameter '{name}' is {saved.get(name, 'absent')} in the file, but the model "
                f"wants {wanted.get(name, 'none')}; use the config that the run was made with"
            )


def _orbax_path(step_folder: Path) -> str:
    """Where Orbax's part of a step is; it takes absolute paths only."""
    return str(step_folder.resolve() / "state")


def _write_json(path: Path, value: Any) -> None:
    """Written beside and renamed, so that the file is whole or absent."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
