"""A tokenizer for documents of several sources, trained on their training split."""

from __future__ import annotations

from pathlib import Path

from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.corpus import corpus_key, ensure_corpus, training_texts
from smallcoder_jax.data.progress import Progress
from smallcoder_jax.data.sources import parse_sources
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.sentencepiece import train_sentencepiece


def make_tokenizer(data: DataConfig, vocab_size: int, train_bytes: int, progress: Progress) -> tuple[Tokenizer, Path]:
    """Trained on up to `train_bytes` of `data.sources`; and the corpus that it was trained on, under `data.dir`.

    Raises UserError where a source cannot be read.
    """
    specs = parse_sources(data.sources)
    corpus = Path(data.dir).expanduser() / "corpus" / corpus_key(specs, data)
    ensure_corpus(specs, data, corpus, progress)
    progress.note(f"training a tokenizer with {vocab_size:,} entries on up to {train_bytes / 1e6:.0f} MB")
    return train_sentencepiece(training_texts(corpus, train_bytes), vocab_size, train_bytes), corpus
