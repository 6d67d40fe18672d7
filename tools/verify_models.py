"""Verifies that runs contain the models that their records describe.

    python -m tools.verify_models --run runs/nano
    python -m tools.verify_models --all --runs runs --json

Computes checksums and data fingerprints again, and evaluates the newest checkpoint on held-out text. The status of a
run is one of verified, not_found, no_checkpoint, wrong_data, corrupt, error. Ends with exit code 0 if every run is
verified, and with 3 otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli


def main(argv: list[str] | None = None) -> int | None:
    """Verifies and prints. Raises UserError if there is nothing to verify, CheckFailed if a run is not verified."""
    args = build_parser().parse_args(argv)
    runs = find_runs(args.runs) if args.all else args.run
    from smallcoder_jax.base.runtime import configure_jax
    from smallcoder_jax.evaluate.verify import verify
    from smallcoder_jax.run import reevaluate

    configure_jax()
    verdicts = []
    for run in runs:
        verdicts.append(verify(run, reevaluate, batches=args.batches, data=args.data))
        if not args.json:
            say(f"{verdicts[-1].status:<14} {run}\n    {verdicts[-1].reason}")
    if args.json:
        say(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=1))
    failed = [verdict.run for verdict in verdicts if verdict.status != "verified"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(verdicts)} not verified: {', '.join(failed)}")
    return None


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.verify_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, action="append", help="a run folder; may be given several times")
    what.add_argument("--all", action="store_true", help="every run under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--data", type=Path, help="folder of the prepared data (default: as recorded in the run)")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument(
        "--batches",
        type=_positive,
        default=None,
        help="validation batches to evaluate (default: as many as in training; fewer are not compared with the record)",
    )
    return parser


def find_runs(folder: Path) -> list[Path]:
    """Every run folder under `folder`, at any depth. Raises UserError if there is none."""
    runs = sorted(path.parent for path in folder.rglob("run.json"))
    if not runs:
        raise UserError(f"no run under {folder}: expected folders that hold run.json; name another with --runs")
    return runs


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
