"""Runs as processes of their own, as a user starts them, for tests that hurt them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smallcoder_jax.loading import load
from smallcoder_jax.train.checkpoint import verify_step

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
PATIENCE = 240.0  # seconds that a process may take on a busy machine

CONFIG = """
from smallcoder_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "resume"
    config.model.update(
        vocab_size=256, width=64, mlp_width=96, layers=2, heads=4, kv_heads=2, head_size=16, context=64, dropout=0.1
    )
    config.compute.update(dtype="float32", layers="scan")
    config.tokenizer.kind = "bytes"
    config.data.update(sources="dir:{root}/code", dir="{root}/data", validation_fraction=0.2)
    config.train.update(steps=10, batch_size=8, sequence_length=64, log_every=1, seed=1)
    config.optimizer.update(name="muon", learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    config.eval.update(every=5, batches=2, sample_tokens=0)
    config.checkpoint.update(every=5, keep=20)
    config.log.update(tensorboard=False, charts_every=0)
    return config
"""


class Runs:
    """Starts runs of the config above, each in a folder of its own under `root`.

    What a run is given is a value of the config (`train.steps=3`) or a flag (`--inject=kill@save`).
    """

    def __init__(self, root: Path):
        self.root = root
        self.keepers: dict[str, subprocess.Popen[bytes]] = {}
        (root / "config.py").write_text(CONFIG.format(root=root))
        (root / "code").mkdir()
        for path in sorted((ROOT / "smallcoder_jax").rglob("*.py"))[:40]:
            (root / "code" / "_".join(path.relative_to(ROOT).parts)).write_bytes(path.read_bytes())

    def start(self, name: str, *given: str) -> subprocess.Popen[bytes]:
        # What a user has: one device, the default strictness.
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
        clean |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.root / "xla")}
        command = [
            *(sys.executable, "-m", "smallcoder_jax.main"),
            *(f"--config={self.root / 'config.py'}", f"--workdir={self.root / name}"),
            *(value if value.startswith("--") else f"--config.{value}" for value in given),
        ]
        # Through a pipe, as to a terminal: a run whose files cannot grow can still say so.
        with (self.root / f"{name}.log").open("ab") as log:
            keeper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        process = subprocess.Popen(command, cwd=ROOT, env=clean, stdout=keeper.stdin, stderr=keeper.stdin)
        assert keeper.stdin is not None
        keeper.stdin.close()
        self.keepers[name] = keeper
        return process

    def finish(self, name: str, *given: str, code: int = 0) -> None:
        """Runs to the end, which has to have this exit code."""
        process = self.start(name, *given)
        ended = process.wait(PATIENCE)
        assert ended == code, self.log(name)
        self.keepers[name].wait(PATIENCE)

    def stop_at(self, name: str, step: int, number: signal.Signals, *overrides: str) -> int:
        """Sends the signal once `step` is saved, and returns the exit code.

        This process saves after every step, and a save waits for the one before it: when `step` is there, the run has
        not got to the end.
        """
        process = self.start(name, *overrides, "checkpoint.every=1")
        manifest = self.root / name / "checkpoints" / str(step) / "manifest.json"
        deadline = time.monotonic() + PATIENCE
        while not manifest.exists():
            assert process.poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.002)
        process.send_signal(number)
        code = process.wait(PATIENCE)
        self.keepers[name].wait(PATIENCE)
        assert step <= self.steps(name)[-1] < STEPS
        return code

    def steps(self, name: str) -> list[int]:
        names = [path.parent.name for path in (self.root / name).glob("checkpoints/*/manifest.json")]
        return sorted(int(name) for name in names if name.isdecimal())

    def log(self, name: str) -> str:
        """All that the runs in this folder have printed."""
        return (self.root / f"{name}.log").read_text()

    def curve(self, name: str) -> list[tuple[int, float, float, float]]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [(row["step"], row["loss"], row["grad_norm"], row["tokens_seen"]) for row in rows if "loss" in row]

    def assert_same(self, name: str, other: str) -> None:
        """Losses, evaluations, parameters and the place in the data agree to the last bit."""
        assert [row[0] for row in self.curve(other)] == list(range(1, STEPS + 1))
        assert self.curve(name) == self.curve(other)
        assert self.evaluations(name) == self.evaluations(other)
        for step in {5, STEPS} & set(self.steps(name)) & set(self.steps(other)):
            mine, theirs = (load(self.root / run, step=step).params for run in (name, other))
            assert jax.tree.structure(mine) == jax.tree.structure(theirs)
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))
        assert self.data_state(name) == self.data_state(other)
        assert verify_step(self.root / name / "checkpoints" / str(STEPS)) == []

    def evaluations(self, name: str) -> list[str]:
        return (self.root / name / "eval_log.csv").read_text().splitlines()

    def data_state(self, name: str, step: int = STEPS) -> Any:
        return json.loads((self.root / name / "checkpoints" / str(step) / "data.json").read_text())
