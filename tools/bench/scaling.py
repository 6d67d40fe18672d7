"""Weak scaling: a training step on 1, 2, 4 and 8 devices, each with the same number of rows.

    python -m tools.bench.scaling --config=configs/nano.py [--devices 1 2 4 8] [--axis data|fsdp|context|tensor]
        [--rows 1] [--record] [--config.key=value ...]

On GPUs, the efficiency is the tokens per second divided by those of one device times the number of devices. On a CPU,
the devices are simulated and share its cores, so that more devices cannot be faster. There, the efficiency is relative
to one device that trains on all rows by itself, and shows the cost of splitting the step.

`--axis=context` and `--axis=tensor` split the rows themselves. As on the other axes, the number of rows is `--rows`
times the number of devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from typing import Any

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import UserError, run_cli
from smallcoder_jax.base.terminal import format_table, human_time
from smallcoder_jax.config import Config, MeshConfig, to_dict
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure
from tools.bench.step import documents_of, run_contender, warn_of_company
from tools.bench.step_timing import cores

AXES = ("data", "fsdp", "context", "tensor")


def main(argv: list[str] | None = None) -> int | None:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m tools.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--axis", choices=AXES, default="data")
    parser.add_argument("--rows", type=int, default=1, help="rows per device")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per number of devices; default: %(default)s")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    options = parser.parse_args(arguments)
    if min([*options.devices, options.rows, options.steps]) < 1:
        raise UserError("--devices, --rows and --steps are 1 or more")
    config = load_config(options.config, overrides)
    warn_of_company()
    found = [measure(config, options.axis, count, options.rows, options.steps) for count in options.devices]
    say(json.dumps(found, indent=1) if options.json else table(found, config, options.axis))
    if options.record:
        benchmarks.record("scaling", figures(found, config, options.axis))


def measure(config: Config, axis: str, devices: int, rows: int, steps: int) -> dict[str, Any]:
    """Seconds of a step with `rows` rows for each of `devices`, and seconds of a step of one device: with all of these
    rows on a CPU, with its own `rows` otherwise.
    """
    split = _run(config, {**_alone(), axis: devices}, devices, rows * devices, steps)
    alone_rows = rows if split["accelerator"] else rows * devices
    alone = split if devices == 1 else _run(config, _alone(), 1, alone_rows, steps)
    seconds, alone_seconds = (statistics.median(each["step_seconds"]) for each in (split, alone))
    return {
        "devices": devices,
        "kind": split["device"],
        "rows": rows * devices,
        "step_seconds": seconds,
        "tokens_per_second": rows * devices * config.train.sequence_length / seconds,
        "alone_step_seconds": alone_seconds,
        "efficiency": alone_seconds / seconds,
    }


def _alone() -> dict[str, int]:
    return dict.fromkeys(AXES, 1)


def _run(config: Config, mesh: dict[str, int], devices: int, rows: int, steps: int) -> dict[str, Any]:
    train = dataclasses.replace(config.train, batch_size=rows, microbatch_size=0)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh), train=train)
    job = {"name": "ours", "steps": steps, "documents": documents_of(None, config), "config": to_dict(config)}
    # Each variable sets the number of devices of one platform, and has no effect on the others.
    visible = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices))),
    }
    result = run_contender(job, sys.executable, visible)
    assert result["devices"] == devices
    return result


def table(found: list[dict[str, Any]], config: Config, axis: str) -> str:
    """The results as a table with one line for each number of devices."""
    rows = [
        (
            each["devices"],
            each["rows"],
            human_time(each["step_seconds"]),
            f"{each['tokens_per_second']:,.0f}",
            human_time(each["alone_step_seconds"]),
            f"{each['efficiency']:.2f}",
        )
        for each in found
    ]
    over = "the same rows" if found[0]["kind"] == "cpu" else "its own rows"
    heading = (
        f"{config.name}, {config.train.sequence_length} tokens a row, {config.compute.dtype}, mesh.{axis}; "
        f"{found[0]['kind']}, {cores()} cores, Python {platform.python_version()}"
    )
    headers = ["devices", "rows", "step, median", "tokens/s", f"one device, {over}", "efficiency"]
    return f"{heading}\n\n{format_table(headers, rows)}"


def figures(found: list[dict[str, Any]], config: Config, axis: str) -> list[Figure]:
    """The figures to record for each number of devices."""
    recorded = []
    for each in found:
        devices = f"{each['devices']} device{'s' if each['devices'] > 1 else ''}"
        name = f"{benchmarks.short(config.name)}, mesh.{axis}, {devices}"
        note = f"rows of {config.train.sequence_length}, {each['rows']} in all; {config.compute.dtype}"
        recorded.append(Figure(name, round(each["tokens_per_second"]), "tokens/s", note=note))
        recorded.append(Figure(f"{name}: efficiency", each["efficiency"], note=note))
    return recorded


if __name__ == "__main__":
    run_cli(main)
