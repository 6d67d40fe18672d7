"""Trains a tokenizer on the training split of several sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.corpus.corpus import corpus_key, ensure_corpus, training_texts
from smallcoder_jax.data.sources.spec import parse_sources
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.sentencepiece import train_sentencepiece

CONVERSATIONS_SHARE = 10  # conversations are at most 1 / 10 of the bytes


def make_tokenizer(
    data: DataConfig, vocab_size: int, train_bytes: int, progress: Progress, conversations: Iterable[str] = ()
) -> tuple[Tokenizer, Path]:
    """A tokenizer trained on up to `train_bytes` bytes of `conversations` and `data.sources`, and the folder of the
    corpus under `data.dir`. Conversations are included because a tokenizer trained on code alone needs twice as many
    ids for the schemas and the JSON of calls.

    Raises UserError where a source cannot be read.
    """
    specs = parse_sources(data.sources)
    corpus = Path(data.dir).expanduser() / "corpus" / corpus_key(specs, data)
    ensure_corpus(specs, data, corpus, progress)
    progress.note(f"training a tokenizer with {vocab_size:,} entries on up to {train_bytes / 1e6:.0f} MB")
    said = list(_first_bytes(conversations, train_bytes // CONVERSATIONS_SHARE))
    left = train_bytes - sum(len(text.encode("utf-8")) for text in said)
    texts = itertools.chain(said, training_texts(corpus, left))
    return train_sentencepiece(texts, vocab_size, train_bytes), corpus


def _first_bytes(texts: Iterable[str], most: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        taken += len(text.encode("utf-8"))
        if taken > most:
            return
        yield text
