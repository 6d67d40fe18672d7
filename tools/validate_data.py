"""Reads prepared data again and compares it with what was recorded about it.

    python -m tools.validate_data --config=configs/nano.py [--all] [--config.key=value ...]

Counts, hashes, fingerprints, the split and the range of ids are checked for all of it; that ids stand for their
document byte for byte, for a sample, or with --all for every document. Exit code 3 when something does not hold.
"""

from __future__ import annotations

import argparse
import sys

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.configfile import load_config, split_overrides
from smallcoder_jax.data.tokens.prepare import find_prepared
from smallcoder_jax.data.tokens.validate import validate

SAMPLE_SHARE = 0.05
MAX_SHOWN = 20


def main(argv: list[str] | None = None) -> None:
    others, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config file; --config.key=value overrides a key")
    parser.add_argument("--all", action="store_true", help="compare every document's ids with its text, not a sample")
    arguments = parser.parse_args(others)
    prepared = find_prepared(load_config(arguments.config, overrides))
    try:
        problems = validate(prepared, 1.0 if arguments.all else SAMPLE_SHARE, say)
    except UserError as error:
        raise CheckFailed(f"prepared data cannot be read: {error}") from error
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise CheckFailed("\n  ".join(["prepared data differs from its records:", *problems[:MAX_SHOWN], *more]))
    say(f"valid: fingerprint {prepared.manifest.fingerprint}")


if __name__ == "__main__":
    run_cli(main)
