"""Finds the fastest tiles of our attention kernel on this device, and writes them to the table of `ops.attention`.

    python -m tools.bench.tune_kernels [--shapes 8192:4:128 ...] [--dry-run]

For every shape (length, query heads per key head, head size; by default the configs' shapes) it takes the tiles that
the kernel accepts, and compares the output and gradients of each with the reference, for rows of one document and for
packed rows. It times the correct candidates, forward and backward, and writes the one with the least time over both
kinds of rows to smallcoder_jax/kernels/tiles_table.json, after every shape. A candidate that is wrong or does not
compile is shown and never chosen.

It needs a device for which there is a kernel, and ends with exit code 2 on others. --dry-run lists the candidates of
each kernel and shape on any machine, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.base.terminal import format_table
from smallcoder_jax.configfile import load_config
from smallcoder_jax.kernels import tile_table
from smallcoder_jax.kernels.tiles import HopperTiles, TpuTiles
from smallcoder_jax.models.families import family_of
from tools.bench import attention_jax, packed_rows
from tools.bench.attention_jax import KERNELS, Kernel
from tools.bench.packed_rows import BOUND, Shape

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOKENS = 16384  # of all timed rows together
KV_HEADS = 2
DOCUMENTS_PER_ROW = 4  # of the packed rows


# The values to try: for each class, groups of sizes that depend on each other. The groups are tuned one after the
# other, because each affects the speed of a different kernel. Combinations that the class refuses are left out.
BLOCKS, STAGES = (64, 128, 256), (2, 3, 4)
VALUES: dict[type[Any], list[dict[str, tuple[int, ...]]]] = {
    TpuTiles: [{"block_q": (128, 256, 512, 1024, 2048), "block_kv": (128, 256, 512, 1024, 2048)}],
    HopperTiles: [
        {"block_kv": BLOCKS, "stages": STAGES},
        {"dq_block_kv": BLOCKS, "dq_stages": STAGES},
        {"dkv_block_q": BLOCKS, "dkv_stages": STAGES},
    ],
}


class Wanted(NamedTuple):
    """A shape to tune for: rows of `length`, with `group` query heads of `size` per key head."""

    length: int
    group: int
    size: int


class Outcome(NamedTuple):
    """The result of a candidate: seconds of each pass over each kind of rows, or the problem."""

    tiles: Any
    seconds: dict[str, float]
    error: float | None
    problem: str | None

    @property
    def total(self) -> float:
        return math.inf if self.problem else sum(self.seconds.values())


def main(argv: list[str] | None = None) -> int | None:
    parser = ArgumentParser(
        prog="python -m tools.bench.tune_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="LENGTH:GROUP:SIZE", help="default: the configs' shapes"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the candidates; compile, time and write nothing")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    shapes = options.shapes or config_shapes()
    if options.dry_run:
        for kernel, shape in itertools.product(KERNELS, shapes):
            here = device.device_kind if device.platform == kernel.platform else None
            say(listing(kernel, shape, here) + "\n")
        return None
    kernels = [kernel for kernel in KERNELS if kernel.platform == device.platform]
    if not kernels:
        needed = ", ".join(f"{kernel.name} for a {kernel.platform}" for kernel in KERNELS)
        raise UserError(
            f"no kernel of ours runs on a {device.platform}; there is {needed}. --dry-run lists candidates anywhere"
        )
    for kernel, shape in itertools.product(kernels, shapes):
        tune(kernel, shape, device.device_kind, interpret=False)
    return None


def config_shapes() -> list[Wanted]:
    """The attention shapes of all configs, without duplicates."""
    found = set()
    for path in sorted(CONFIGS.glob("[a-z]*.py")):
        config = load_config(str(path), [])
        shape = family_of(config.model).attention_shape(config.model, config.train.sequence_length)
        if shape is not None:
            found.add(Wanted(*shape))
    return sorted(found)


def candidates(
    kernel: Kernel, shape: Wanted, device: str | None, values: dict[str, tuple[int, ...]], start: Any
) -> Iterator[tuple[Any, str | None]]:
    """The tiles `start` with all combinations of `values` that the class allows and rows can fill, each with the
    kernel's obstacle."""
    for sizes in itertools.product(*values.values()):
        try:
            tiles = dataclasses.replace(start, **dict(zip(values, sizes, strict=True)))
        except ValueError:
            continue
        if tiles.row <= max(shape.length, kernel.tiles().row):
            yield tiles, kernel.obstacle(shape.length, shape.group, shape.size, "bfloat16", tiles, device)


def listing(kernel: Kernel, shape: Wanted, device: str | None) -> str:
    """The candidates of a shape as a table: for every group of sizes, with the other sizes at their defaults."""
    rows = [
        (tiles, obstacle or "")
        for values in VALUES[kernel.tiles]
        for tiles, obstacle in candidates(kernel, shape, device, values, kernel.tiles())
    ]
    return f"{heading(kernel, shape)}\n{format_table(['tiles', 'not possible because'], rows)}"


def heading(kernel: Kernel, shape: Wanted) -> str:
    return f"{kernel.name}: rows of {shape.length}, {shape.group} query heads of {shape.size} to a key head"


def tune(kernel: Kernel, shape: Wanted, device: str, *, interpret: bool) -> tile_table.Entry:
    """Tries all candidates, prints their results, and writes the best. Raises CheckFailed if none is correct."""
    trial, tiles, best = Trial(kernel, shape, interpret), kernel.tiles(), None
    say(heading(kernel, shape))
    for values in VALUES[kernel.tiles]:
        possible = [one for one, reason in candidates(kernel, shape, device, values, tiles) if reason is None]
        outcomes = [trial.of(one) for one in possible]
        say(results(outcomes) + "\n")
        best = choose(outcomes)
        tiles = best.tiles
    assert best
    measured = {
        "microseconds": {name: round(seconds * 1e6, 1) for name, seconds in best.seconds.items()},
        "of": f"{rows_of(shape)} rows of {shape.length}, {KV_HEADS} key heads",
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }
    return tile_table.write_entry(best.tiles, device, shape.size, shape.group, shape.length, measured)


class Trial:
    """The rows of a shape, of one document and packed, with the reference results for candidates."""

    def __init__(self, kernel: Kernel, shape: Wanted, interpret: bool):
        self.kernel, self.interpret = kernel, interpret
        heads = KV_HEADS * shape.group
        kinds = {
            name: Shape(rows_of(shape), shape.length, mean, heads, KV_HEADS, shape.size)
            for name, mean in (("one document", None), ("packed", shape.length // DOCUMENTS_PER_ROW))
        }
        self.cases = {name: attention_jax.make_case(kind) for name, kind in kinds.items()}
        self.wants = {name: attention_jax.truth(kind, self.cases[name]) for name, kind in kinds.items()}

    def of(self, tiles: Any) -> Outcome:
        """Checks a candidate, and times it if it is correct."""
        say(f"  {tiles}", sys.stderr)
        try:
            return self._measure(tiles)
        except Exception as error:  # a candidate that does not compile has this outcome; others may still work
            return Outcome(tiles, {}, None, packed_rows.failure(error))

    def _measure(self, tiles: Any) -> Outcome:
        attends = {name: self.kernel.attend(case, tiles, self.interpret) for name, case in self.cases.items()}
        errors = [attention_jax.errors(attends[name], case, self.wants[name]) for name, case in self.cases.items()]
        worst = max(error for one in errors for error in one.values())
        if not worst <= BOUND:
            return Outcome(tiles, {}, worst, f"wrong: relative error {worst:.1e}, allowed {BOUND}")
        seconds: dict[str, float] = {}
        for name, case in self.cases.items():
            times = attention_jax.times(attends[name], case)
            seconds |= {f"{name}, {part}": times[part] for part in ("forward", "backward")}
        return Outcome(tiles, seconds, worst, None)


def choose(outcomes: Sequence[Outcome]) -> Outcome:
    """The correct candidate with the least total time. Raises CheckFailed if there is none."""
    best = min(outcomes, key=lambda outcome: outcome.total, default=None)
    if best is None or best.problem:
        reasons = "; ".join(f"{outcome.tiles}: {outcome.problem}" for outcome in outcomes) or "no candidate is possible"
        raise CheckFailed(f"no tiles can be chosen: {reasons}")
    return best


def results(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table, fastest first."""
    parts = max((list(outcome.seconds) for outcome in outcomes), key=len, default=[])
    rows = [
        (
            outcome.tiles,
            "-" if outcome.error is None else f"{outcome.error:.1e}",
            *(f"{outcome.seconds[part] * 1e6:.0f}" if part in outcome.seconds else "-" for part in parts),
            outcome.problem or "",
        )
        for outcome in sorted(outcomes, key=lambda outcome: outcome.total)
    ]
    return format_table(["tiles", "error", *(f"{part}, us" for part in parts), ""], rows)


def rows_of(shape: Wanted) -> int:
    return max(1, TOKENS // shape.length)


def _shape(text: str) -> Wanted:
    parts = text.split(":")
    if len(parts) != len(Wanted._fields) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected LENGTH:GROUP:SIZE, such as 8192:4:128")
    return Wanted(*map(int, parts))


if __name__ == "__main__":
    run_cli(main)
