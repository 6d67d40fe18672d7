"""The main command: flags, config, dispatch.

python -m smallcoder_jax.main --config=configs/medium_lc.py --workdir=runs/medium_lc [--config.key=value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

from smallcoder_jax.base import distributed
from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import EXIT_INTERRUPTED, CheckFailed, UserError, run_cli
from smallcoder_jax.base.faults import KINDS, PLACES, Faults
from smallcoder_jax.config import Config, from_config_dict
from smallcoder_jax.configfile import load_config, split_overrides

DESCRIPTION = """Trains the model of a config file, or continues the run that the workdir holds.

Any value of the config can be set: --config.train.steps=100 --config.data.sources=dir:/my/code
--mode=preflight estimates memory, time and cost on devices that need not be on this machine.
Exit codes: 0 done; 2 a mistake in the flags or the config; 3 it does not fit (preflight); 4 too many updates in a row
skipped (loss or gradient not finite, or a spike); 5 stalled (a wait took too long; the stacks of all threads are
written); 75 interrupted by SIGTERM or Ctrl-C (saved; the same command continues). When another process of the same run
died, the code is 134 or 1: start all processes again, as launch/ does, and they continue from the last checkpoint."""


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m smallcoder_jax.main",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a config file, for example configs/nano.py, or a run's config.json; evaluate: by default the run's own",
    )
    parser.add_argument("--workdir", metavar="DIR", help="the run folder; default runs/NAME of the config")
    parser.add_argument("--mode", choices=("train", "evaluate", "preflight"), default="train")
    parser.add_argument("--step", help="evaluate: which checkpoint, 'best' or a step; default the best")
    parser.add_argument(
        "--allow-changed",
        metavar="KEYS",
        default="",
        help="continue a run although these differ, for example data.mixture,optimizer.learning_rate",
    )
    parser.add_argument(
        "--inject",
        metavar="FAULTS",
        default="",
        help=f"faults to inject, as KIND@PLACE:N,...; kinds: {', '.join(KINDS)}; places: {', '.join(PLACES)}",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: where process 0 runs, or auto")
    parser.add_argument("--processes", type=int, metavar="N", help="several processes: how many")
    parser.add_argument("--process", type=int, metavar="I", help="several processes: which this one is, from 0")
    parser.add_argument(
        "--topology", help="preflight: v5e:16x16, v5p:4x4x4, 2xv6e:8x8 (slices), h200:2x8 (nodes x GPUs), cpu"
    )
    parser.add_argument("--tokens", type=float, help="preflight: a budget of tokens; default what the config trains on")
    parser.add_argument("--price", type=float, help="preflight: the price of one chip-hour, in any currency")
    parser.add_argument("--json", metavar="FILE", help="preflight: also write the report to FILE")
    parser.add_argument("--list", action="store_true", help="list the files in configs/, and exit")
    options = parser.parse_args(arguments)
    if options.list:
        say(list_configs())
        return 0
    if options.mode == "evaluate":
        _check_mode(options)
        return evaluate(options, overrides)
    if options.config is None:
        raise UserError("--config is missing: --config=configs/nano.py, for example; --list names all")
    config = load_config(options.config, overrides)
    _check_mode(options)
    if options.mode == "preflight":
        return preflight(config, options)
    workdir = Path(options.workdir or Path("runs") / config.name)
    cluster = distributed.find_cluster(options.coordinator, options.processes, options.process, os.environ)
    from smallcoder_jax import run

    allow_changed = tuple(key.strip() for key in options.allow_changed.split(",") if key.strip())
    faults = Faults(options.inject)
    with distributed.joined(cluster):
        result = run.train(config, workdir, faults=faults, allow_changed=allow_changed)
        return EXIT_INTERRUPTED if result.interrupted else 0


def _check_mode(options: argparse.Namespace) -> None:
    """Refuses flags of another mode, which would be ignored."""
    if options.step is not None and options.mode != "evaluate":
        raise UserError("--step belongs to --mode=evaluate; training continues from the newest step")
    if options.mode == "preflight":
        if options.topology is None:
            raise UserError("--mode=preflight needs --topology: v5e:16x16, v5p:4x4x4, v6e:8x8, h200:1x8 or cpu")
        for name in ("tokens", "price"):
            value = getattr(options, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name}={value:g}: expected a positive number")
        return
    for name in ("topology", "tokens", "price", "json"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} belongs to --mode=preflight")


def evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the measures of a model as JSON. A run's own config is used unless --config is of another stage."""
    if distributed.find_cluster(options.coordinator, options.processes, options.process, os.environ) is not None:
        raise UserError("--mode=evaluate runs in one process; leave out --coordinator, --processes and --process")
    config = load_config(options.config, overrides) if options.config is not None else None
    if config is None and options.workdir is None:
        raise UserError("--mode=evaluate needs --workdir: the folder of a run, which is evaluated by its own config")
    workdir = Path(options.workdir or Path("runs") / (config.name if config else ""))
    own = _own_config(workdir, overrides)
    if own is not None and (config is None or config.stage.name == own.stage.name):
        if config not in (None, own):
            where = f"{workdir / 'config.json'} and the --config. flags"
            say(f"evaluated by the run's own config, {where}, not by {options.config}", file=sys.stderr)
        config = own
    if config is None:
        raise UserError(
            f"{workdir} is not a run, so it has no config of its own; name one with --config=configs/nano.py"
        )
    from smallcoder_jax import run

    say(json.dumps(run.evaluate_run(workdir, config, options.step), indent=2))
    return 0


def _own_config(workdir: Path, overrides: list[str]) -> Config | None:
    """The config of the run in `workdir`, with overrides; None for an export, or when there is nothing."""
    return load_config(str(workdir / "config.json"), overrides) if (workdir / "run.json").exists() else None


def preflight(config: Config, options: argparse.Namespace) -> int:
    """Prints the report as a table, and with --json also writes it. Raises CheckFailed when the config does not fit."""
    from smallcoder_jax import run
    from smallcoder_jax.preflight.show import table

    report = run.preflight(config, options.topology, options.tokens, options.price)
    say(table(report))
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json={options.json} cannot be written: {error.strerror}") from error
    if not report.memory.fits:
        remedy = f"it would fit with {' '.join(report.remedy)}" if report.remedy else "nothing that was tried fits"
        raise CheckFailed(f"{report.name} does not fit into the memory of {report.topology}; {remedy}")
    return 0


def list_configs() -> str:
    """A table of the project's config files, first variants, then stages: name, exact parameter count, context and
    data. Imports no model.
    """
    from smallcoder_jax.base.terminal import format_table
    from smallcoder_jax.configfile import config_files, config_folder, read_config_file

    folder = config_folder()
    configs = [(path, from_config_dict(read_config_file(str(path)))) for path in config_files(folder)]
    configs.sort(key=lambda item: (item[1].model.parameter_count(), item[1].model.context))
    stages = config_files(folder / "stages")
    configs += [(Path(f"{path}:VARIANT"), from_config_dict(read_config_file(str(path)))) for path in stages]
    rows = [
        (
            path.relative_to(folder.parent),
            config.name,
            f"{config.model.parameter_count():,}",
            config.model.context,
            config.data.sources,
        )
        for path, config in configs
    ]
    return format_table(["config", "name", "parameters", "context", "data"], rows)


if __name__ == "__main__":
    run_cli(main)
