"""Prepares the data of a config: corpus, tokenizer and token shards. Existing parts are kept.

    python -m tools.prepare_data --config=configs/nano.py [--config.data.sources=dir:PATH ...]

Prints the accounting at the end: what was read, kept and dropped, for which reasons, and statistics of the documents.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import run_cli
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.configfile import load_config, split_overrides
from smallcoder_jax.data.tokens.prepare import prepare
from smallcoder_jax.data.tokens.statistics import format_report


def main(argv: list[str] | None = None) -> None:
    others, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config file; --config.key=value overrides a key")
    arguments = parser.parse_args(others)
    prepared = prepare(load_config(arguments.config, overrides), Progress(sys.stderr))
    say(format_report(prepared.manifest))
    say()
    say(f"corpus:    {prepared.corpus_folder}")
    say(f"tokenizer: {prepared.tokenizer_folder}")
    say(f"tokens:    {prepared.tokens_folder} (fingerprint {prepared.manifest.fingerprint[:16]})")
    check = ["python", "-m", "tools.validate_data", f"--config={arguments.config}", *overrides]
    say(f"check it:  {shlex.join(check)}")


if __name__ == "__main__":
    run_cli(main)
