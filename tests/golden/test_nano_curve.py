"""Learning: the loss curve of a model like nano on fixed text, by both kinds of products; one batch learned by heart.

The text comes from a small grammar and a generator of its own, so that it is the same on every machine. After a change
that is meant to move the curves they are written anew:

    python -m tests.golden.test_nano_curve --write
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from smallcoder_jax import optim
from smallcoder_jax.config import ComputeConfig, Config, DecoderConfig, MeshConfig, OptimizerConfig, TrainConfig
from smallcoder_jax.configfile import load_config
from smallcoder_jax.kernels import flash_tpu
from smallcoder_jax.kernels.tile_table import Tiles
from smallcoder_jax.kernels.tiles import TpuTiles
from smallcoder_jax.mesh import batch_sharding, make_mesh
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.ops import attention, precision
from smallcoder_jax.stages.shared import next_token
from smallcoder_jax.train.program import make_program
from smallcoder_jax.train.state import init_state, state_sharding
from smallcoder_jax.train.step import make_train_step

BYTE_NANO = str(Path(__file__).resolve().parents[2] / "configs" / "byte_nano.py")
GOLDEN = Path(__file__).with_name("nano_losses.json")
TOLERANCE = 0.02  # relative: other processors and library versions round otherwise
STEPS, EVERY, ROWS, LENGTH = 50, 5, 4, 128
OPTIMIZER = OptimizerConfig(
    name="muon",
    learning_rate=3e-3,
    muon_learning_rate=0.02,
    weight_decay=0.01,
    schedule="linear",
    warmup_steps=10,
    final_ratio=0.0,
)
# The shape that nano had when the curve was drawn first: the config may change, the curve does not.
MODEL = DecoderConfig(
    vocab_size=4096, width=256, mlp_width=704, layers=4, heads=4, kv_heads=2, head_size=64, context=1024
)
NAMES = ("total", "item", "count", "left", "right", "index", "value", "result")


class Draws:
    """Numbers of the multiplicative congruential generator MINSTD: fixed by arithmetic, unlike a library's."""

    def __init__(self, seed: int):
        self._state = seed

    def below(self, limit: int) -> int:
        self._state = self._state * 48271 % 2147483647
        return self._state % limit

    def of(self, choices: tuple[str, ...]) -> str:
        return choices[self.below(len(choices))]


def function(draws: Draws) -> str:
    """A function of a few lines that looks like Python."""
    name, first, second = draws.of(NAMES), draws.of(NAMES), draws.of(NAMES)
    lines = [f"def {name}_{draws.below(100)}({first}, {second}):"]
    for _ in range(1 + draws.below(3)):
        operation = draws.of(("+", "-", "*", "//"))
        lines.append(f"    {draws.of(NAMES)} = {first} {operation} {draws.below(10)}")
        if draws.below(2):
            lines.append(f"    if {second} {draws.of(('<', '>', '=='))} {draws.below(10)}:")
            lines.append(f"        return {second}")
    lines.append(f"    return {first}")
    return "\n".join(lines) + "\n\n\n"


def batches(rows: int, length: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """`count` batches of one document per row; ids are the bytes after the first 256 entries of the vocabulary."""
    draws = Draws(2024)
    text = ""
    while len(text) < count * rows * length + 1:
        text += function(draws)
    ids = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32) + 256
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for start in range(0, count * rows * length, rows * length):
        yield {
            "tokens": ids[start : start + rows * length].reshape(rows, length),
            "targets": ids[start + 1 : start + rows * length + 1].reshape(rows, length),
            "positions": positions,
            "segment_ids": np.ones((rows, length), np.int32),
            "loss_weights": np.ones((rows, length), np.float32),
        }


def nano_config(
    rows: int, length: int, steps: int, optimizer: OptimizerConfig, matmul: precision.Kind = "exact"
) -> Config:
    return Config(
        name="golden",
        model=MODEL,
        compute=ComputeConfig(dtype="float32", layers="scan", matmul=matmul),
        train=TrainConfig(steps=steps, batch_size=rows, sequence_length=length, seed=0),
        optimizer=optimizer,
    )


def losses(config: Config, stream: Iterable[dict[str, np.ndarray]]) -> Iterator[float]:
    """The training loss of each step, on one device."""
    mesh = make_mesh(MeshConfig(), config.model, config.train.batch_size, jax.devices()[:1])
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps, DECODER.muon)
    shardings = state_sharding(mesh, jax.eval_shape(lambda: init_state(config, optimizer)), DECODER.sharding)
    state = jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings)()
    step = make_train_step(
        next_token.make_loss(config),
        optimizer,
        optim.schedule(config.optimizer, config.train.steps),
        reported=("accuracy",),
        peak=config.optimizer.learning_rate,
        microbatches=1,
        matmul=precision.choose(config.compute, "cpu").kind,
        guarding=config.guard,
        mesh=mesh,
        shardings=shardings,
        frozen_shardings={},
    )
    for batch in stream:
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)), {})
        yield float(metrics["loss"])


def golden_run(matmul: precision.Kind) -> dict[str, float]:
    curve = list(losses(nano_config(ROWS, LENGTH, STEPS, OPTIMIZER, matmul), batches(ROWS, LENGTH, STEPS)))
    return {str(step + 1): round(curve[step], 5) for step in range(STEPS) if step == 0 or (step + 1) % EVERY == 0}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("matmul", ["exact", pytest.param("mixed", marks=pytest.mark.slow)])
def test_the_loss_curve_does_not_move(matmul: precision.Kind) -> None:
    found = golden_run(matmul)
    assert found["1"] == pytest.approx(math.log(MODEL.vocab_size), rel=TOLERANCE)
    assert found == pytest.approx(json.loads(GOLDEN.read_text())[matmul], rel=TOLERANCE)


def test_the_two_kinds_of_products_have_curves_of_their_own() -> None:
    """Else a run that asked for one would have had the other."""
    recorded = json.loads(GOLDEN.read_text())
    assert recorded["exact"] != recorded["mixed"]
    assert recorded["mixed"]["10"] == pytest.approx(recorded["exact"]["10"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_loss_curve_does_not_move_when_the_kernel_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = functools.partial(flash_tpu.flash_attention, interpret=True)
    monkeypatch.setattr(attention.flash_tpu, "flash_attention", interpreted)
    small = Tiles(TpuTiles(128, 128), False, "the smallest")
    monkeypatch.setattr(attention, "lookup", lambda *shape: small)
    steps = 25
    config = nano_config(ROWS, LENGTH, STEPS, OPTIMIZER)
    curves = [
        list(losses(dataclasses.replace(config, compute=compute), batches(ROWS, LENGTH, steps)))
        for compute in (dataclasses.replace(config.compute, attention=name) for name in ("xla", "pallas_tpu"))
    ]
    assert curves[0] != curves[1]  # two programs did run
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[1][-1] < 0.7 * curves[1][0]


@pytest.mark.usefixtures("standard_promotion")
def test_nano_learns_one_batch_by_heart() -> None:
    steps = 80
    config = nano_config(4, 64, steps, OPTIMIZER)
    (batch,) = batches(4, 64, 1)
    learned = next((loss for loss in losses(config, [batch] * steps) if loss < 0.05), None)
    assert learned is not None, f"after {steps} steps on one batch the loss was never below 0.05"
    print(f"loss on one batch: {learned:.4f}")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_byte_nano_learns_one_batch_by_heart() -> None:
    """As configured, at a constant rate."""
    steps = 200
    changes = ["optimizer.schedule=constant", "optimizer.weight_decay=0.0", f"train.steps={steps}"]
    changes += ["train.batch_size=8", "train.sequence_length=32", "compute.matmul=exact"]
    config = load_config(BYTE_NANO, [f"--config.{change}" for change in changes])
    (batch,) = batches(8, 32, 1)
    batch = {**batch, "tokens": batch["tokens"] - 256, "targets": batch["targets"] - 256}
    program = make_program(config, next_token.make_loss(config))
    state = jax.jit(lambda: init_state(config, program.optimizer), out_shardings=program.shardings)()
    batch = jax.device_put(batch, batch_sharding(program.mesh))
    found = []
    while len(found) < steps and (not found or found[-1] >= 0.05):
        state, metrics = program.step(state, batch, {})
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.05, f"after {steps} steps on one batch the loss was {found[-1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the curve, instead of showing it")
    options = parser.parse_args()
    curves: dict[precision.Kind, dict[str, float]] = {"exact": golden_run("exact"), "mixed": golden_run("mixed")}
    text = json.dumps(curves, indent=2) + "\n"
    if options.write:
        GOLDEN.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
