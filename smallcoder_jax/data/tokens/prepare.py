"""Prepares token shards from `data.sources`: corpus, tokenizer and tokens, each made only where it does not exist yet.

All three are stored under `data.dir`, in folders named by a hash of everything that determines their content.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.base.artifacts import new_folder, short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object, write_json
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config
from smallcoder_jax.data.corpus.corpus import (
    corpus_key,
    ensure_corpus,
    read_accounting,
    read_split,
    splits_of,
    training_texts,
)
from smallcoder_jax.data.sources.spec import SourceSpec, parse_sources
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.encode import DocumentEncoder
from smallcoder_jax.data.tokens.statistics import token_statistics
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.load import check_tokenizer, load_tokenizer, open_tokenizer, spare_rows
from smallcoder_jax.tokenizers.sentencepiece import train_sentencepiece

FORMAT = 1  # increased whenever the same documents and tokenizer start to give other shards
_TOKENIZER_FORMAT = 2  # increased whenever the same texts or folder start to give another tokenizer
_HASH_FILE = "hash.json"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Data that is ready for training, and the folders of its parts."""

    manifest: shards.Manifest
    tokens_folder: Path
    tokenizer: Tokenizer
    tokenizer_folder: Path
    corpus_folder: Path

    @property
    def accounting(self) -> Mapping[str, Any]:
        """What was read, kept, dropped and tokenised, per source: nested JSON values."""
        return self.manifest.accounting


def prepare(config: Config, progress: Progress | None = None) -> Prepared:
    """Makes whichever of corpus, tokenizer and token shards is missing under `config.data.dir`, and loads the result.

    Raises UserError for a source that cannot be read or holds nothing usable, for a tokenizer whose size does not fit
    the model or that changed since the data was prepared, and for a full disk.
    """
    places = _Places.of(config)
    ensure_corpus(places.specs, config.data, places.corpus, progress)
    tokenizer = _ensure_tokenizer(config, places, progress)
    if progress and (said := spare_rows(tokenizer, config.model.vocab_size)):
        progress.note(said)
    if not places.tokens.is_dir():
        _write_tokens(places, tokenizer, config.data.repository_order, progress)
    prepared = _load(config, places, tokenizer)
    if prepared.manifest.dummy and progress:
        for source in prepared.accounting["sources"]:
            if source["dummy"]:
                progress.note(
                    f"DUMMY DATA: generated text stands in for {source['spec']} ({source['dummy']}). It "
                    f"stays until it is deleted: to try the source again, delete {places.corpus}, {places.tokenizer} "
                    f"and {places.tokens} and start again"
                )
    return prepared


def prepare_corpus(config: Config, progress: Progress | None = None) -> Path:
    """Makes only the corpus, where it is missing, and returns its folder. Raises UserError as `prepare` does."""
    places = _Places.of(config)
    ensure_corpus(places.specs, config.data, places.corpus, progress)
    return places.corpus


def find_prepared(config: Config) -> Prepared:
    """The data that `prepare` made for this config earlier. Raises UserError where a part of it is missing."""
    places = _Places.of(config)
    for folder in (places.corpus, places.tokenizer, places.tokens):
        if not folder.is_dir():
            raise UserError(
                f"the data of this config is not prepared, or its sources changed since: {folder} does not exist. "
                "Prepare it with python -m tools.prepare_data and the same config"
            )
    return _load(config, places, _ensure_tokenizer(config, places, None))


@dataclasses.dataclass(frozen=True)
class _Places:
    """The folders of a config's data, each named by a hash of everything that determines its content."""

    specs: tuple[SourceSpec, ...]
    corpus: Path
    tokenizer: Path
    tokens: Path

    @classmethod
    def of(cls, config: Config) -> _Places:
        root = Path(config.data.dir).expanduser()
        specs = parse_sources(config.data.sources)
        corpus = corpus_key(specs, config.data)
        settings = config.tokenizer
        if settings.is_trained:
            made_from = [_TOKENIZER_FORMAT, corpus, config.model.vocab_size, settings.train_bytes]
        else:
            made_from = [_TOKENIZER_FORMAT, settings.kind, settings.path]
        tokenizer = short_key(made_from)
        mixture = [[spec.text, spec.weight, spec.fim] for spec in specs]
        tokens = short_key([FORMAT, corpus, tokenizer, mixture, config.data.repository_order])
        return cls(specs, root / "corpus" / corpus, root / "tokenizers" / tokenizer, root / "tokens" / tokens)


def _load(config: Config, places: _Places, tokenizer: Tokenizer) -> Prepared:
    manifest = shards.read_manifest(places.tokens)
    made = (places.tokenizer, places.tokens)
    check_tokenizer(tokenizer, config.model.vocab_size, manifest.tokenizer_hash, made)
    return Prepared(manifest, places.tokens, tokenizer, places.tokenizer, places.corpus)


def _ensure_tokenizer(config: Config, places: _Places, progress: Progress | None) -> Tokenizer:
    """The tokenizer in its folder in `places`; where that is missing, it is trained or copied there first."""
    settings, vocab_size = config.tokenizer, config.model.vocab_size
    given = None if settings.is_trained else open_tokenizer(settings.kind, settings.path)
    if given is not None:
        check_tokenizer(given, vocab_size)
    folder = places.tokenizer
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            made = given or _train(places.corpus, vocab_size, settings.train_bytes, progress)
            made.save(temporary)
            write_json(temporary / _HASH_FILE, {"hash": made.hash})
    what = f"the hash of the tokenizer. Delete {folder} and prepare again"
    prepared_hash = read_json_object(folder / _HASH_FILE, what).get("hash")
    if not isinstance(prepared_hash, str):
        raise UserError(f"{folder / _HASH_FILE} holds no hash; expected {what}")
    stored = load_tokenizer(folder)
    for tokenizer in (given or stored, stored):
        check_tokenizer(tokenizer, vocab_size, prepared_hash, (folder, places.tokens))
    return stored


def _train(corpus: Path, vocab_size: int, train_bytes: int, progress: Progress | None) -> Tokenizer:
    if progress:
        progress.note(f"training a tokenizer with {vocab_size:,} entries on up to {train_bytes / 1e6:.0f} MB")
    return train_sentencepiece(training_texts(corpus, train_bytes), vocab_size, train_bytes)


def _write_tokens(places: _Places, tokenizer: Tokenizer, repository_order: bool, progress: Progress | None) -> None:
    accounting = read_accounting(places.corpus)
    if progress:
        size = sum(source[split]["bytes"] for source in accounting["sources"] for split in splits_of(source))
        progress.start("tokenising", total_bytes=size)
    encoder = DocumentEncoder(tokenizer, repository_order)

    def stream(spec: SourceSpec, split: str) -> Iterator[tuple[np.ndarray, int]]:
        for ids, size in encoder.encode(read_split(places.corpus, split, spec.text)):
            if progress:
                progress.add(size)
            yield ids, size

    sources = [
        shards.SourceTokens(
            spec.text, spec.weight, spec.fim, **{split: stream(spec, split) for split in splits_of(entry)}
        )
        for spec, entry in zip(places.specs, accounting["sources"], strict=True)
    ]
    with new_folder(places.tokens) as folder:
        shards.write_tokens(
            folder,
            sources,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            tokenizer=os.path.relpath(places.tokenizer, places.tokens),
            dummy=accounting["dummy"],
            accounting=lambda entries: _manifest_accounting(accounting, places.corpus, repository_order, entries),
        )
    if progress:
        progress.finish()


def _manifest_accounting(
    accounting: dict[str, Any], corpus: Path, repository_order: bool, entries: Sequence[shards.SourceEntry]
) -> dict[str, Any]:
    return {
        **accounting,
        "corpus": corpus.name,
        "repository_order": repository_order,
        "tokens": token_statistics(entries),
    }
