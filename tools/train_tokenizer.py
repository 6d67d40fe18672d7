"""Trains a sentencepiece tokenizer on data sources and measures it on documents that it was not trained on.

    python -m tools.train_tokenizer --sources=stdlib --vocab-size=4096 --output=tokenizers/nano

Use it with --config.tokenizer.path=tokenizers/nano. Ends with exit code 3 if a held-out document does not decode to the
same bytes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.corpus.corpus import read_split
from smallcoder_jax.data.tokens.train_tokenizer import make_tokenizer
from smallcoder_jax.tokenizers.base import Tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True, help="in the form of data.sources: stdlib, dir:PATH, hf:NAME, ...")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, including special pieces and bytes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--train-bytes", type=int, default=30_000_000, help="how much text to train on")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where corpora are kept")
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        raise UserError(f"--output {arguments.output} exists and is not empty; name another folder or delete it")
    data = DataConfig(sources=arguments.sources, dir=str(arguments.data_dir))
    tokenizer, corpus = make_tokenizer(data, arguments.vocab_size, arguments.train_bytes, Progress(sys.stderr))
    ratio, size = bytes_per_token(tokenizer, (document.text for document in read_split(corpus, "validation")))
    tokenizer.save(arguments.output)
    say(f"entries:         {tokenizer.vocab_size:,}")
    say(f"bytes per token: {ratio:.3f} on {size / 1e6:.2f} MB of held-out text, which decodes byte for byte")
    say(f"hash:            {tokenizer.hash[:16]}")
    path = shlex.quote(f"--config.tokenizer.path={arguments.output}")
    say(f"use it with:     {path} --config.model.vocab_size={tokenizer.vocab_size}")


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[float, int]:
    """UTF-8 bytes per id over `texts`, and their total bytes. Raises CheckFailed if ids do not decode to their text."""
    held_out = list(texts)
    tokens = size = 0
    for text, ids in zip(held_out, tokenizer.encode_batch(held_out, os.cpu_count() or 1), strict=True):
        raw = text.encode("utf-8")
        if b"".join(tokenizer.token_bytes[i] for i in ids) != raw:
            raise CheckFailed(f"a held-out document does not come back byte for byte; it begins with {text[:60]!r}")
        tokens, size = tokens + len(ids), size + len(raw)
    return size / max(tokens, 1), size


if __name__ == "__main__":
    run_cli(main)
