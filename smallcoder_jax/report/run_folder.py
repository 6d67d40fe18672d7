"""The run folder: the paths of all files of a run, and the JSON files that describe it.

Folders are created when something is first written into them, so that reading a run never creates one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax import config as config_module
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import finite, read_json_object, read_text, utc_now, write_json

VERSIONED_PACKAGES = (
    "smallcoder_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "tensorflow-datasets",
    "sentencepiece",
    "clu",
    "ml-collections",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of a run. `path` need not exist yet."""

    path: Path

    @property
    def config_json(self) -> Path:
        return self.path / "config.json"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def tokens_json(self) -> Path:
        return self.path / "tokens.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def training_log_csv(self) -> Path:
        return self.path / "training_log.csv"

    @property
    def eval_log_csv(self) -> Path:
        return self.path / "eval_log.csv"

    @property
    def evaluations_jsonl(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def metrics_history_json(self) -> Path:
        return self.path / "metrics_history.json"

    @property
    def text_samples_json(self) -> Path:
        return self.path / "text_samples.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def charts(self) -> Path:
        return self.path / "charts"

    @property
    def latest_chart(self) -> Path:
        return self.charts / "training_latest.png"

    @property
    def boundaries_chart(self) -> Path:
        return self.charts / "boundaries.png"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped"

    @property
    def training_info_json(self) -> Path:
        return self.path / "training_info.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def relative(self, path: Path) -> str:
        """`path` relative to the run folder, so that recorded paths stay valid if all is moved together."""
        return os.path.relpath(path.resolve(), self.path.resolve())

    @contextlib.contextmanager
    def locked(self) -> Iterator[str]:
        """Creates the folder and locks it, so that no other run trains in it. Yields the token stored in the lock.

        Process 0 takes the lock for all processes of its run. Raises UserError when the folder cannot be created or
        written, or another run trains in it.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.path} is no name in UTF-8, which its logs have to hold; choose another --workdir"
            ) from error
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Without O_NONBLOCK, opening a pipe of that name would block.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.fdopen(os.open(self.lock, flags, 0o666), "a")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}; choose another --workdir") from error
        with file:  # the system releases the lock when the process ends, however it ends
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process trains in {self.path}; wait until it ends, or choose another --workdir"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be locked: {error}; choose a --workdir on another file system"
                ) from error
            token = secrets.token_hex(16)
            file.truncate(0)
            file.write(token)
            file.flush()
            yield token

    def check_shared(self, token: str) -> None:
        """Raises UserError when this process sees another folder than the one whose lock holds `token`."""
        if not self.lock.exists() or read_text(self.lock, "the lock of a run") != token:
            raise UserError(
                f"{self.path} is not the folder in which process 0 trains: all processes of a run write its "
                "checkpoints; choose a --workdir on a file system that all machines share"
            )

    def write_skipped(self, step: int, facts: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> Path:
        """Saves the batch of a skipped update (this process's rows, `.npz`) and facts about it (`.json`).

        Returns the path of the batch.
        """
        import jax

        self.skipped.mkdir(parents=True, exist_ok=True)
        path = self.skipped / f"step-{step}-process-{jax.process_index()}.npz"
        arrays: dict[str, Any] = dict(batch)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
        write_json(path.with_suffix(".json"), {"step": step, **facts})
        return path

    def add_evaluation(self, result: Mapping[str, Any]) -> None:
        """Appends the result of evaluating a checkpoint, and the time, to `evaluations.jsonl`. Raises OSError."""
        line = json.dumps(finite({"at": utc_now(), **result}))
        with self.evaluations_jsonl.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_config(self, config: config_module.Config) -> None:
        """Writes the resolved configuration to `config.json`."""
        write_json(self.config_json, config_module.to_dict(config))

    def write_run_json(self, identity: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Writes `run.json`: identity, versions, command, git revision, platform, device, and `extra`.

        It is written at every start. `starts` has one entry for each start, which shows whether a run was continued on
        another machine or with other versions. `identity` cannot differ between starts (`compare_identity`). Entries
        that `update_run_json` set are kept.
        """
        earlier = self.read_run_json() if self.run_json.exists() else {}
        environment = describe_environment()
        start = {"at": utc_now(), **{key: environment[key] for key in ("command", "git", "device", "versions")}}
        content = {**earlier, "identity": dict(identity), **environment, **extra}
        content["starts"] = [*earlier.get("starts", []), start]
        write_json(self.run_json, content)

    def update_run_json(self, **values: Any) -> None:
        """Sets top-level entries of `run.json` and keeps the others. Creates the file if there is none."""
        content = self.read_run_json() if self.run_json.exists() else {}
        write_json(self.run_json, {**content, **values})

    def read_run_json(self) -> dict[str, Any]:
        """The content of `run.json`. Raises UserError if it is missing or damaged."""
        content = read_json_object(self.run_json, "the identity of a run; is this a run folder?")
        starts = content.get("starts", [])
        if not isinstance(starts, list) or not all(
            isinstance(s, dict) and {"at", "command"} <= s.keys() for s in starts
        ):
            raise UserError(f"{self.run_json}: 'starts' is not the list that was written; take the file from a copy")
        return content


def compare_identity(recorded: Any, current: Any) -> list[str]:
    """The differences between two identities, one line each, with nested keys joined by dots. Empty when they agree.

    Both may come from files with arbitrary content. Raises UserError when one is not a mapping.
    """
    for identity in (recorded, current):
        if not isinstance(identity, Mapping):
            raise UserError(
                f"the identity of a run is a JSON object, but a {type(identity).__name__} is recorded: run.json or a "
                "checkpoint's meta.json was changed; choose another --workdir, or take the file from a copy"
            )
    before, after = _flatten(finite(recorded)), _flatten(finite(current))
    for identity in (before, after):
        if "model.width" in identity:  # recorded before families were introduced
            identity.setdefault("model.family", "decoder")
        # Formerly recorded: a path, while `data.judge` identifies the model itself.
        identity.pop("data.rl.reward_model", None)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            lines.append(f"{key}: the run has {before[key]!r}, now absent")
        elif key not in before:
            lines.append(f"{key}: absent in the run, now {after[key]!r}")
        elif before[key] != after[key]:
            lines.append(f"{key}: the run has {before[key]!r}, now {after[key]!r}")
    return lines


def check_allowed(allowed: tuple[str, ...], identity: Mapping[str, Any]) -> None:
    """Raises UserError for a key of `--allow-changed` that is not part of an identity."""
    parts = [part for key in _flatten(finite(identity)) for part in _prefixes(key)]
    for key in allowed:
        if key not in parts:
            raise UserError(
                f"--allow-changed={key}: expected a part of what identifies a run; {config_module.nearest(key, parts)}"
            )


def _prefixes(key: str) -> list[str]:
    words = key.split(".")
    return [".".join(words[: count + 1]) for count in range(len(words))]


def split_allowed(differences: list[str], allowed: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Splits the lines of `compare_identity` into those that are refused, and those under a key in `allowed`."""
    passed = [line for line in differences if any(part in allowed for part in _prefixes(line.split(":", 1)[0]))]
    return [line for line in differences if line not in passed], passed


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def write_training_info(
    folder: RunFolder,
    *,
    variant_name: str,
    parameters: int,
    dataset: str,
    config: config_module.Config,
    steps: int,
    tokens_seen: int,
    train_seconds: float,
    final_train_loss: float | None,
    best_val_loss: float | None,
    best_step: int | None,
    skipped_updates: int,
    dummy_data: bool,
    started_from: str | None,
) -> None:
    """Writes `training_info.json`: what was trained, on what, for how long and how well.

    `parameters` is the exact count. `train_seconds` covers all starts of the run. Losses are in nats per token, and
    None if there was none. `started_from` is the path of the start model, if there is one.
    """
    content = {
        "variant_name": variant_name,
        "parameters": parameters,
        "parameters_m": round(parameters / 1e6, 3),
        "dataset": dataset,
        "dummy_data": dummy_data,
        "started_from": started_from,
        "steps": steps,
        "tokens_seen": tokens_seen,
        "train_seconds": train_seconds,
        "final_train_loss": final_train_loss,
        "best_val_loss": best_val_loss,
        "best_step": best_step,
        "skipped_updates": skipped_updates,
        "trained_at": utc_now(),
        "config": config_module.to_dict(config),
    }
    write_json(folder.training_info_json, content)


def describe_environment() -> dict[str, Any]:
    """The environment of the run: command line, git revision, Python, platform, devices, package versions."""
    import jax

    devices = jax.devices()
    return {
        "command": shlex.join(sys.orig_argv),
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "processes": jax.process_count(),
        "versions": {name: _version(name) for name in VERSIONED_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # running from a checkout that is not installed
        return None


def _git_revision() -> dict[str, Any] | None:
    """The revision of the checkout that contains this package, and whether it has changes; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):  # no git on this machine, or a checkout that git refuses
        return None
