"""The cost of a kill: how many steps are lost, and how long it takes until training continues.

    python -m tools.bench.restarts --config=configs/nano.py [--kills 5] [--check] [--record] [--config.key=value ...]

Starts the run as a separate process in a temporary folder, first from the beginning and then repeatedly. Each process
is killed (SIGKILL) before a step that is chosen at random from the next 2 * checkpoint.every. The seconds from the
command to the first step include imports, the data, compilation or its cache, and, after a kill, the verification of a
checkpoint.

--check ends with exit code 3 if a kill loses 2 * checkpoint.every steps or more. A kill loses the steps since the
newest save, and the steps that were trained while that save was written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int | None:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m tools.bench.restarts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    config = load_config(options.config, overrides)
    every = config.checkpoint.every
    if options.kills < 1:
        raise UserError(f"--kills={options.kills}: expected 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--config={options.config}", f"--workdir={folder}/run", *overrides]
        found = measure(given, every, options.kills, Path(folder) / "xla")
    if options.json:
        say(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        say("\n".join(f"{name:<{width}}  {value:.4g}" for name, value in found.items()))
    if options.record:
        benchmarks.record("restarts", figures(found, benchmarks.short(config.name), options.kills))
    if options.check and found["steps lost, most"] >= 2 * every:
        raise CheckFailed(f"a kill lost {found['steps lost, most']:.0f} steps; checkpoint.every is {every}")


def measure(given: list[str], every: int, kills: int, cache: Path) -> dict[str, float]:
    """Kills the run that `given` starts once at its beginning, and then `kills` times."""
    draw = random.Random(0)
    first, _ = life(given, 2, cache)
    trained, lost, seconds = 1, [], []
    for number in range(kills + 1):
        until = trained + draw.randint(1, 2 * every)
        start, resumed = life(given, until + 1, cache)
        seconds.append(start)
        if number:
            lost.append(trained - resumed)
        trained = until
    return {
        "checkpoint.every": every,
        "first start, s": first,
        "second start, s": seconds[0],
        "start after a kill, s": statistics.median(seconds[1:]),
        "steps lost, mean": statistics.mean(lost),
        "steps lost, most": max(lost),
    }


def life(given: list[str], step: int, cache: Path) -> tuple[float, int]:
    """Starts the run and has it killed before `step`. Returns the seconds to its first step, and the step from which it
    resumed."""
    command = [sys.executable, "-m", "smallcoder_jax.main", *given, f"--inject=kill@step:{step}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    begin, seconds, resumed, lines = time.monotonic(), None, 0, []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "first step after" in line:
                seconds = time.monotonic() - begin
            if found := re.search(r"resuming at step (\d+) ", line):
                resumed = int(found[1])
    if process.returncode != -9 or seconds is None:
        raise UserError(
            f"the run ended with {process.returncode} before step {step}, at which it should have been killed:\n"
            + "".join(lines[-20:])
        )
    return seconds, resumed


def figures(found: dict[str, float], name: str, kills: int) -> list[Figure]:
    """The figures to record, with the limit of --check."""
    most, limit = found["steps lost, most"], 2 * found["checkpoint.every"]
    note = f"checkpoint.every {found['checkpoint.every']:.0f}; kills {kills}"
    return [
        Figure(f"{name}: first start", found["first start, s"], "s", note="nothing compiled"),
        Figure(f"{name}: second start", found["second start, s"], "s"),
        Figure(f"{name}: start after a kill", found["start after a kill, s"], "s", note=note),
        Figure(f"{name}: steps lost by a kill, mean", found["steps lost, mean"], note=note),
        Figure(f"{name}: steps lost by a kill, most", most, None, f"below {limit:.0f}", most < limit, note),
    ]


if __name__ == "__main__":
    run_cli(main)
