"""Reads prepared data from disk again and compares it with the records about it."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.corpus.corpus import (
    CorpusFingerprint,
    count_documents,
    read_accounting,
    read_split,
    splits_of,
)
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.encode import DocumentEncoder
from smallcoder_jax.data.tokens.prepare import Prepared
from smallcoder_jax.data.tokens.verification import verify_shards
from smallcoder_jax.tokenizers.base import Tokenizer


def validate(prepared: Prepared, sample_share: float, tell: Callable[[str], None]) -> list[str]:
    """A message for every mismatch between the data on disk and its records; empty where there is none.

    Counts, hashes, fingerprints, the split and the range of ids are checked for everything. Whether the ids stand for
    exactly the bytes of their document is checked for a share `sample_share` of the documents. `tell` is called with a
    line for each finished check.
    """
    problems = _check_corpus(prepared)
    tell(f"corpus {prepared.corpus_folder.name}: counts, hashes, split, fingerprint: {_verdict(problems)}")
    found = _check_manifest(prepared) + _check_shards(prepared)
    tell(f"tokens {prepared.tokens_folder.name}: counts, ids, fingerprint: {_verdict(found)}")
    problems += found
    found, checked = _check_texts(prepared, sample_share)
    tell(f"ids back to text, {checked:,} documents: {_verdict(found)}")
    return problems + found


def _verdict(problems: Sequence[str]) -> str:
    return "ok" if not problems else f"{len(problems)} problems"


def _check_corpus(prepared: Prepared) -> list[str]:
    folder = prepared.corpus_folder
    accounting = read_accounting(folder)
    problems, fingerprint = [], CorpusFingerprint()
    sides: dict[str, str] = {}
    stored: collections.Counter[str] = collections.Counter()
    repositories: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for source in accounting["sources"]:
        for split in splits_of(source):
            documents = size = 0
            for document in read_split(folder, split, source["spec"]):
                documents, size = documents + 1, size + len(document.text.encode("utf-8"))
                fingerprint.add(split, document)
                identity = document.identity
                if identity in sides:
                    problems.append(f"{document.path}: the same text is in {sides[identity]} and again in {split}")
                sides[identity] = split
                if document.repository and source["split_by"] == "repository":
                    repositories[source["spec"], document.repository].add(split)
            stored[split] += documents
            if {"documents": documents, "bytes": size} != source[split]:
                problems.append(
                    f"{source['spec']}, {split}: {documents} documents of {size} bytes; recorded {source[split]}"
                )
    for split in dict.fromkeys(split for source in accounting["sources"] for split in splits_of(source)):
        if (count := count_documents(folder, split)) != stored[split]:
            problems.append(f"{split}: {count} documents are stored; {stored[split]} are recorded")
    problems += [f"repository {name} is on both sides" for (_, name), found in repositories.items() if len(found) > 1]
    if fingerprint.hexdigest() != accounting["fingerprint"]:
        problems.append(f"the corpus's fingerprint is {fingerprint.hexdigest()}; recorded {accounting['fingerprint']}")
    return problems


def _check_manifest(prepared: Prepared) -> list[str]:
    """Compares what the manifest says about the corpus with the corpus's own accounting."""
    accounting, manifest = read_accounting(prepared.corpus_folder), prepared.manifest
    problems = [
        f"the manifest's accounting says {name}={manifest.accounting.get(name)!r}; the corpus's {value!r}"[:500]
        for name, value in accounting.items()
        if manifest.accounting.get(name) != value
    ]
    if manifest.dummy != accounting["dummy"]:
        problems.append(f"the manifest says dummy={manifest.dummy}; the corpus's accounting {accounting['dummy']}")
    recorded, found = [source["spec"] for source in accounting["sources"]], [entry.spec for entry in manifest.sources]
    if recorded != found:
        problems.append(f"the manifest's sources are {', '.join(found)}; the corpus's {', '.join(recorded)}")
    return problems


def _check_shards(prepared: Prepared) -> list[str]:
    manifest, folder = prepared.manifest, prepared.tokens_folder
    lengths = np.array([len(piece) for piece in prepared.tokenizer.token_bytes])
    problems = []
    for source in manifest.sources:
        for name, recorded in source.splits.items():
            documents = tokens = size = largest = 0
            for ids in shards.read_records(folder, recorded.files, manifest.dtype):
                documents, tokens, largest = documents + 1, tokens + len(ids), max(largest, int(ids.max(initial=0)))
                size += int(lengths[ids[ids < len(lengths)]].sum())
            where = f"{source.spec}, {name}"
            if (documents, tokens, size) != (recorded.documents, recorded.tokens, recorded.bytes):
                problems.append(
                    f"{where}: {documents} records of {tokens} tokens and {size} bytes; recorded {recorded.documents}, "
                    f"{recorded.tokens} and {recorded.bytes}"
                )
            if largest >= manifest.vocab_size:
                problems.append(f"{where}: id {largest} is outside the vocabulary of {manifest.vocab_size}")
    fingerprint = shards.compute_fingerprint(folder, manifest)
    if fingerprint != manifest.fingerprint:
        problems.append(f"the token shards' fingerprint is {fingerprint}; recorded {manifest.fingerprint}")
    try:
        verify_shards(folder, manifest)
    except UserError as error:
        problems.append(str(error))
    return problems


def _check_texts(prepared: Prepared, sample_share: float) -> tuple[list[str], int]:
    manifest, tokenizer = prepared.manifest, prepared.tokenizer
    in_order = manifest.accounting.get("repository_order")
    if not isinstance(in_order, bool):
        return ["the manifest's accounting does not say whether documents are in repository order"], 0
    encoder = DocumentEncoder(tokenizer, in_order)
    draw = random.Random(0)
    problems, checked = [], 0
    for source in manifest.sources:
        for name, split in source.splits.items():
            records = shards.read_records(prepared.tokens_folder, split.files, manifest.dtype)
            documents = read_split(prepared.corpus_folder, name, source.spec)
            for group, ids in itertools.zip_longest(encoder.groups(documents), records):
                if group is None or ids is None:
                    missing = "documents" if group is None else "records"
                    problems.append(f"{source.spec}, {name}: there are fewer {missing} than the other side has")
                    break
                if checked and draw.random() >= sample_share:
                    continue
                checked += 1
                problem = _compare([text for _, text in encoder.parts(group)], ids, tokenizer)
                if problem:
                    problems.append(f"{source.spec}, {name}, {group[0].path}: {problem}")
    return problems, checked


def _compare(texts: Sequence[str], ids: np.ndarray, tokenizer: Tokenizer) -> str:
    if len(ids) < 2:
        return f"the record holds {len(ids)} ids; expected at least the first and the last"
    if ids[0] != tokenizer.bos_id or ids[-1] != tokenizer.eos_id:
        return f"the ids run from {ids[0]} to {ids[-1]}; expected {tokenizer.bos_id} to {tokenizer.eos_id}"
    expected = "".join(texts).encode("utf-8")
    found = b"".join(tokenizer.token_bytes[i] for i in ids if i < len(tokenizer.token_bytes))
    if found == expected:
        return ""
    differing = (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    at = next(differing, min(len(found), len(expected)))
    return f"the ids decode to other bytes than the text, from byte {at} on"
