"""How long a save delays training, and what its checksums cost.

    python -m tools.bench.checkpoint --config=configs/tiny.py --config.train.batch_size=1 \\
        --config.train.sequence_length=128 --config.compute.dtype=float32 [--saves 5] [--check] [--record]

Trains a step and saves, in turns, on this machine's disk. "Held up" is the time until training continues: the arrays
are copied, and then written and hashed on other threads, which end before the next step is timed. Checksums and a
verified load are also timed separately.

--check ends with exit code 3 if a save delays training by 0.3 s or more per GB of state or, at the config's
checkpoint.every, by 2% or more of the time of the steps between two saves. A save of any size takes some hundredths of
a second, so the first figure is meaningful only from about 1 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure

SECONDS_PER_GB, SHARE = 0.3, 0.02


def main(argv: list[str] | None = None) -> int | None:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m tools.bench.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder to save in; default: a temporary folder, which is removed")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if options.saves < 1:
        raise UserError(f"--saves={options.saves}: expected 1 or more")
    config = load_config(options.config, overrides)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(config, Path(folder), options.saves)
    if options.json:
        say(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        say("\n".join(f"{name:<{width}}  {value:.4g}" for name, value in found.items()))
    if options.record:
        benchmarks.record("checkpoints", figures(found, benchmarks.short(config.name)))
    if options.check and (found["held up, s/GB"] >= SECONDS_PER_GB or found["held up, share of training"] >= SHARE):
        raise CheckFailed(f"a save holds training up for longer than {SECONDS_PER_GB} s/GB or {SHARE:.0%} of it")
    return None


def measure(config: Any, folder: Path, saves: int) -> dict[str, float]:
    """Medians over `saves` saves, each after a step, in seconds and GB (1e9 bytes)."""
    import jax

    from smallcoder_jax.mesh import batch_sharding
    from smallcoder_jax.stages.shared.next_token import make_loss
    from smallcoder_jax.train.checkpoint import Checkpointer, checksums
    from smallcoder_jax.train.program import make_program
    from smallcoder_jax.train.state import init_state
    from tools.bench.step_timing import random_batches

    program = make_program(config, make_loss(config))
    state = jax.jit(lambda: init_state(config, program.optimizer), out_shardings=program.shardings)()
    batch = jax.device_put(random_batches(config, None)[0], batch_sharding(program.mesh))
    compiled = program.step.lower(state, batch, {}).compile()
    gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
    checkpointer = Checkpointer(folder, keep=1)
    steps, held, whole = [], [], []
    for _ in range(saves + 1):  # the first warms up
        start = time.perf_counter()
        state, metrics = compiled(state, batch, {})
        jax.block_until_ready((state, metrics))
        trained = time.perf_counter()
        checkpointer.save(state, {}, None)
        going_on = time.perf_counter()
        checkpointer.wait()
        for times, seconds in ((steps, trained - start), (held, going_on - trained)):
            times.append(seconds)
        whole.append(time.perf_counter() - trained)
    newest = folder / str(int(state.step))
    start = time.perf_counter()
    checksums(newest)
    summed = time.perf_counter()
    checkpointer.restore(int(state.step), program.state)
    restored = time.perf_counter()
    step_time, held_up = statistics.median(steps[1:]), statistics.median(held[1:])
    return {
        "state, GB": gigabytes,
        "step, s": step_time,
        "held up, s": held_up,
        "held up, s/GB": held_up / gigabytes,
        "held up, share of training": held_up / (held_up + step_time * config.checkpoint.every),
        "until the step is saved, s": statistics.median(whole[1:]),
        "checksums, s/GB, on another thread": (summed - start) / gigabytes,
        "verified load, s": restored - summed,
    }


def figures(found: dict[str, float], name: str) -> list[Figure]:
    """The figures to record, with the limits of --check."""
    per_gb, share = found["held up, s/GB"], found["held up, share of training"]
    note = f"{found['state, GB']:.2f} GB of state, a step of {found['step, s']:.2f} s between two saves"
    return [
        Figure(
            f"{name}: held up by a save, per GB",
            per_gb, "s/GB", f"below {SECONDS_PER_GB}", per_gb < SECONDS_PER_GB, note,
        ),
        Figure(f"{name}: held up by a save", found["held up, s"], "s", note=note),
        Figure(
            f"{name}: held up, share of training",
            100 * share, "%", f"below {SHARE:.0%}", share < SHARE, note,
        ),
        Figure(f"{name}: checksums", found["checksums, s/GB, on another thread"], "s/GB", note=note),
        Figure(f"{name}: until the step is saved", found["until the step is saved, s"], "s", note=note),
        Figure(f"{name}: verified load", found["verified load, s"], "s", note=note),
    ]  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
