"""Saves and restores checkpoints. This is the only module that uses Orbax.

    checkpoints/250/state/         Orbax: `params`, and `rest` (optimizer, step, RNG, guard)
    checkpoints/250/meta.json      config, run identity, tokenizer hash, leaves, evaluation so far
    checkpoints/250/data.json      state of the data iterator, the same on all processes
    checkpoints/250/manifest.json  checksum of every other file, written last: without it the step does not exist
    checkpoints/best               link to the best step by validation loss

Orbax notices truncated and missing files, but silently loads flipped bits. We therefore keep our own checksums and
verify them on every load. They are computed on the thread that waits for the asynchronous save.

With several processes, each writes its part of the arrays. Process 0 writes everything else once all parts are written.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from smallcoder_jax.base import distributed
from smallcoder_jax.base.checksums import checksum
from smallcoder_jax.base.errors import Interrupted, UserError
from smallcoder_jax.base.faults import NONE, Faults, flip_bit
from smallcoder_jax.base.files import read_json, write_json
from smallcoder_jax.mesh import path_name
from smallcoder_jax.train import layouts
from smallcoder_jax.train.state import TrainState

MANIFEST = "manifest.json"
BEST = "best"


def _not_of_orbax(record: logging.LogRecord) -> bool:
    orbax = f"{os.sep}orbax{os.sep}"
    return not (orbax in record.pathname or (record.name == "asyncio" and orbax in record.getMessage()))


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`hook`, without the errors of TensorStore's threads that finish after Orbax has closed its event loop."""

    def show(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    return show


# For every error that it raises, Orbax also logs the stacks of its threads: hundreds of lines before our one line.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_of_orbax)
sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


class Damaged(UserError):
    """A step whose files differ from those that were saved."""


class Restored(NamedTuple):
    state: TrainState
    meta: dict[str, Any]
    data_state: Any


class Checkpointer:
    """Saves checkpoints without blocking. Keeps the newest `keep` steps and the best one."""

    def __init__(self, folder: Path, keep: int, faults: Faults = NONE):
        self.folder, self.keep, self.faults = folder, keep, faults
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._refused: set[int] = set()
        distributed.from_first(self._make_room)

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():  # left by a process that was killed while saving
            ours = leftover.name.isdecimal() and leftover.is_dir() and not leftover.is_symlink()
            if ours and not (leftover / MANIFEST).is_file():
                shutil.rmtree(leftover)
        link = self.folder / BEST
        if link.is_dir() and not link.is_symlink():  # the folder is a copy that followed links
            link.rename(_free_name(self.folder, f"{BEST}.copied"))
        best = best_step(self.folder)  # a process may have been killed before it moved the link
        if best is not None:
            self._mark_best(best)

    def save(
        self, state: TrainState, meta: dict[str, Any], data_state: Any, *, best: bool = False, keep: int | None = None
    ) -> None:
        """Starts saving `state` under its step. Raises the error of an earlier save that failed.

        Returns when the arrays are copied from the device. `best` also marks this step as the best one. `keep`
        overrides the checkpointer's number of steps to keep, this one included; 0 keeps all.
        """
        self.wait()
        step = int(state.step)
        target = self.folder / str(step)
        first = distributed.is_first()
        saved = distributed.from_first(lambda: self._is_saved(step))
        self._refused.discard(step)
        if saved:  # only the mark may have changed
            if best and first:
                self._mark_best(step)
            return
        rest = {name: value for name, value in state._asdict().items() if name != "params"}
        try:
            if first:
                target.mkdir(parents=True, exist_ok=True)
                write_json(target / "meta.json", {**meta, "step": step, "leaves": leaves_of(state.params)})
                write_json(target / "data.json", data_state)
            self.faults.reach("save")
            response = ocp.save_checkpointables_async(_orbax_path(target), {"params": state.params, "rest": rest})
        except OSError as error:
            raise self._failure(error) from error

        def finish() -> None:
            try:
                response.result()  # Orbax waits for the slowest process before it finishes on any
                self.faults.reach("manifest")
                if first:
                    write_json(target / MANIFEST, {"format": 1, "files": checksums(target)})
                    if best:
                        self._mark_best(step)
                    self._prune(self.keep if keep is None else keep)
                    if "bitflip" in self.faults.reach("checkpoint"):
                        flip_bit(target)
            except BaseException as error:  # whatever it is, only the next call on the main thread can report it
                self._error = error

        self._thread = threading.Thread(target=finish, name=f"save-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Waits for the pending save. Raises UserError naming the cause when it failed (a full disk, for example)."""
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
        """The complete steps, ascending, as process 0 sees them."""
        return distributed.from_first(lambda: complete_steps(self.folder))

    def best(self) -> int | None:
        """The step that the link `best` names."""
        return _linked(self.folder)

    def restore(
        self, step: int, abstract: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored:
        """Verifies every checksum and returns the state of `step`, placed by the shardings in `abstract`.

        `check` gets meta.json before any array is read, and raises to refuse the step. Raises Damaged, naming the file,
        when a checksum does not match, and UserError, naming the parameter, when a shape or dtype differs.
        """
        distributed.from_first(lambda: verified(self.folder / str(step)) and None)
        return self._load(step, abstract, check)

    def _load(self, step: int, abstract: TrainState, check: Callable[[dict[str, Any]], None]) -> Restored:
        target = self.folder / str(step)
        meta = read_meta(target)
        check(meta)
        rest = {name: value for name, value in abstract._asdict().items() if name != "params"}
        loaded = _load_trees(target, meta, {"params": abstract.params, "rest": rest})
        state = TrainState(params=loaded["params"], **loaded["rest"])
        if int(state.step) != step:
            raise Damaged(f"checkpoint {target} holds the state of step {int(state.step)}")
        return Restored(state, meta, read_json(target / "data.json", "the place of a checkpoint in the data"))

    def restore_newest(
        self, abstract: TrainState, check: Callable[[dict[str, Any]], None], note: Callable[[str], None]
    ) -> Restored | None:
        """Restores the newest step whose checksums match, as `restore` does; None when nothing was ever saved.

        `note` is told of newer steps that are damaged. They stay until the run saves the same step again, and are then
        renamed to `STEP.damaged`. Raises Damaged when there are steps but none is sound.
        """
        sound, reasons = distributed.from_first(self._newest_sound)
        self._refused |= {step for step, _ in reasons}
        if reasons and sound is None:
            raise Damaged(
                f"no checkpoint under {self.folder} is sound:\n  " + "\n  ".join(text for _, text in reasons) + "\n"
                "bring them back from a copy, or choose another --workdir to start anew"
            )
        for _, text in reasons:
            note(f"{text}\n  refused; trying the step before")
        return None if sound is None else self._load(sound, abstract, check)

    def _newest_sound(self) -> tuple[int | None, list[tuple[int, str]]]:
        reasons = []
        for step in reversed(complete_steps(self.folder)):
            try:
                verified(self.folder / str(step))
                return step, reasons
            except Damaged as error:
                reasons.append((step, str(error)))
        return None, reasons

    def _is_saved(self, step: int) -> bool:
        target = self.folder / str(step)
        if step in self._refused:
            damaged = self.folder / f"{step}.damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            target.rename(damaged)
        return (target / MANIFEST).is_file()

    def _failure(self, error: BaseException) -> BaseException:
        # Another process died while this one waited for it. This is not the user's mistake, and a restart may help.
        if isinstance(error, TimeoutError | jax.errors.JaxRuntimeError):
            return error
        return UserError(
            f"could not save a checkpoint under {self.folder}: {type(error).__name__}: {error}. Free space or choose "
            "another --workdir; the steps saved before are intact and the same command continues from the newest"
        )

    def _mark_best(self, step: int) -> None:
        link = self.folder / f"{BEST}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(str(step))
        os.replace(link, self.folder / BEST)

    def _prune(self, keep: int) -> None:
        best = self.best()
        for step in [step for step in complete_steps(self.folder) if step not in self._refused][:-keep]:
            if step != best:
                (self.folder / str(step) / MANIFEST).unlink()  # first, so that a half-removed step is not complete
                shutil.rmtree(self.folder / str(step))


def complete_steps(folder: Path) -> list[int]:
    """The steps under a run's checkpoints whose save was finished, ascending. Links do not count."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if not path.is_symlink() and (path / MANIFEST).is_file())
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def best_step(folder: Path) -> int | None:
    """The complete step with the lowest validation loss recorded when it was saved; the first one of a tie.

    When no loss was recorded, or a step cannot be read, it is the step that the link `best` names. None when there is
    neither.
    """
    recorded = []
    for step in complete_steps(folder):
        try:
            meta = read_meta(folder / str(step))
        except UserError:  # it may be the best one; loading it will report the error
            return _linked(folder)
        evaluation, best = meta.get("evaluation"), meta.get("best_loss")
        if isinstance(best, float) and isinstance(evaluation, dict) and evaluation.get("loss") == best:
            recorded.append((best, step))
    return min(recorded)[1] if recorded else _linked(folder)


def _linked(folder: Path) -> int | None:
    """The complete step that the link `best` names. A link to anything else is ignored."""
    link = folder / BEST
    name = os.readlink(link) if link.is_symlink() else ""
    return int(name) if name.isdecimal() and int(name) in complete_steps(folder) else None


def _free_name(folder: Path, name: str) -> Path:
    taken = (folder / f"{name}{number or ''}" for number in itertools.count())
    return next(path for path in taken if not path.exists())


def find_step(folder: Path, step: int | str | None) -> Path:
    """The folder of `step` under a run's checkpoints. `step` is a number, 'best', or None for the best step if one is
    known and else the newest.

    Raises UserError when there is no such step.
    """
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"no complete checkpoint under {folder}; train first, or name another run")
    if step in (None, BEST):
        best = best_step(folder)
        step = best if best is not None else step
    if step is None:
        step = steps[-1]
    if not str(step).isdecimal() or int(step) not in steps:
        raise UserError(f"no checkpoint '{step}' under {folder}; there are: {', '.join(map(str, steps))}")
    return folder / str(int(step))


def load_params(step_folder: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Verifies a step; returns only its parameters, and its meta.json. `abstract` is as in `Checkpointer.restore`."""
    target = verified(step_folder)
    meta = read_meta(target)
    return _load_trees(target, meta, {"params": abstract})["params"], meta


def _load_trees(target: Path, meta: dict[str, Any], abstract: dict[str, Any]) -> dict[str, Any]:
    """Loads the trees (`params`, `rest`) that `abstract` has. Raises UserError when its parameters are not the saved
    ones.
    """
    flat = layouts.is_flat(meta["leaves"])
    wanted = layouts.flattened(abstract) if flat else abstract
    _check_leaves(meta["leaves"], leaves_of(wanted["params"]), target)
    with _interrupts_as_they_are():
        loaded = ocp.load_checkpointables(_orbax_path(target), wanted)
    return layouts.unflattened(loaded, abstract) if flat else loaded


@contextlib.contextmanager
def _interrupts_as_they_are() -> Iterator[None]:
    """Re-raises a signal's exception from the body unchanged, because Orbax wraps it in one of its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt | Interrupted):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def read_meta(step_folder: Path) -> dict[str, Any]:
    """The content of a step's meta.json. Raises UserError if it is missing, damaged or malformed."""
    path = step_folder / "meta.json"
    what = "what a checkpoint says of itself, with its leaves"
    meta = read_json(path, what)
    if not isinstance(meta, dict) or not isinstance(meta.get("leaves"), dict):
        raise UserError(f"{path} is not of the form that was written; expected {what}")
    return meta


def verify_step(step_folder: Path) -> list[str]:
    """The problems with the files of a step, one line each; empty when every checksum matches."""
    manifest = step_folder / MANIFEST
    if not manifest.is_file():
        return [f"{manifest}: missing, so the save was never finished"]
    try:
        recorded = read_json(manifest, "the checksums of a checkpoint")["files"]
    except (UserError, KeyError, TypeError) as error:
        return [f"{manifest}: unreadable ({error})"]
    if not isinstance(recorded, dict):
        return [f"{manifest}: unreadable ('files' is a {type(recorded).__name__}, not an object)"]
    found = checksums(step_folder, recorded)
    problems = [f"{step_folder / name}: missing" for name in sorted(recorded.keys() - found.keys())]
    problems += [f"{step_folder / name}: not in the manifest" for name in sorted(found.keys() - recorded.keys())]
    changed = sorted(name for name in recorded.keys() & found.keys() if recorded[name] != found[name])
    problems += [f"{step_folder / name}: content does not match its checksum" for name in changed]
    return problems or _misnamed(step_folder)


def _misnamed(step_folder: Path) -> list[str]:
    """A line that says so when a step's folder is named after another step; else empty."""
    try:
        step = read_meta(step_folder).get("step")
    except UserError:  # its checksum matches, so it was saved like this; reading it will report the error
        return []
    if not step_folder.name.isdecimal() or step == int(step_folder.name):  # a name like STEP.damaged is no number
        return []
    return [f"{step_folder / 'meta.json'}: it is of step {step}: the folder was renamed"]


def verified(step_folder: Path) -> Path:
    """Returns the folder itself if every checksum matches; raises Damaged otherwise."""
    problems = verify_step(step_folder)
    if problems:
        raise Damaged(f"checkpoint {step_folder} is damaged:\n  " + "\n  ".join(problems))
    return step_folder


def checksums(step_folder: Path, recorded: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a step except its manifest, by relative path.

    With `recorded`, a file whose size differs from the recorded one is not read, and its hash is None.
    """
    files = sorted(path for path in step_folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files += sorted(path for path in (step_folder / "state").rglob(MANIFEST) if path.is_file())

    def one(path: Path) -> tuple[str, dict[str, Any]]:
        name = path.relative_to(step_folder).as_posix()
        return name, checksum(path, None if recorded is None else recorded.get(name, {}))

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(one, files))


def leaves_of(tree: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype] of every array. Orbax silently casts to another dtype, so we compare them ourselves."""
    return {
        path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_leaves(saved: dict[str, list[Any]], wanted: dict[str, list[Any]], target: Path) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            own = "/".join(part for part in name.split("/") if part != "model")
            raise UserError(
                f"checkpoint {target}: parameter '{own}' is {saved.get(name, 'absent')} in the file, but the model "
                f"wants {wanted.get(name, 'none')}; use the config that the run was made with"
            )


def _orbax_path(step_folder: Path) -> str:
    """The absolute path of Orbax's part of a step. Orbax does not accept relative paths."""
    return str(step_folder.resolve() / "state")
