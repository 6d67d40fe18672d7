"""Reads prepared data again and compares them with their records.

    python -m tools.validate_data --config=configs/nano.py [--all] [--config.key=value ...]

Checks counts, hashes, fingerprints, the split and the range of ids for all data. Checks for a sample, or with --all for
every document, that the ids decode to their document byte for byte. Ends with exit code 3 if a check fails.
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
    parser.add_argument("--all", action="store_true", help="compare the ids of all documents with their texts")
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
