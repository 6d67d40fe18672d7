"""Bits per byte of general-purpose compressors on the same text, as a reference for a model's bits per byte."""

from __future__ import annotations

import itertools
import lzma
import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object, write_json
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.prepare import Prepared
from smallcoder_jax.tokenizers.base import Tokenizer

CACHES = {"validation": "compressors.json", "test": "compressors_test.json"}
SAMPLE_BYTES = 32 << 20  # the slowest compressor needs about a second per MiB


def gzip_bytes(data: bytes) -> int:
    """The size of `gzip -9` of `data`, header and checksum included."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
    return len(compressor.compress(data)) + len(compressor.flush())


def xz_bytes(data: bytes) -> int:
    """The size of `xz -9e` of `data`, header and CRC64 included."""
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


COMPRESSORS: dict[str, Callable[[bytes], int]] = {"gzip -9": gzip_bytes, "xz -9e": xz_bytes}


def compressor_bits_per_byte(texts: Sequence[bytes]) -> dict[str, dict[str, float]]:
    """Bits of compressed size per byte of text: {compressor: {"per_file": each text by itself, "all_in_one": joined}}.

    Both are divided by the total number of bytes, so a long text counts more than a short one. Empty texts are left
    out, because a model has nothing to predict in them. The compressors release the interpreter lock, so all cores are
    used. Raises UserError when there is no text.
    """
    texts = [text for text in texts if text]
    total = sum(map(len, texts))
    if not total:
        raise UserError("there is no text to compress: the held-out split holds no bytes")
    together = b"".join(texts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        joined = {name: pool.submit(size, together) for name, size in COMPRESSORS.items()}  # the longest first
        alone = {name: sum(pool.map(size, texts)) for name, size in COMPRESSORS.items()}
        return {
            name: {"per_file": 8 * alone[name] / total, "all_in_one": 8 * joined[name].result() / total}
            for name in COMPRESSORS
        }


def held_out_references(prepared: Prepared, split: str = "validation") -> dict[str, float]:
    """Compressors' bits per byte on the documents of a held-out split of `prepared`, each by itself and all in one.

    The result is computed once and stored with the token shards. If there are more than `SAMPLE_BYTES`, only every n-th
    document is used.
    """
    cache = prepared.tokens_folder / CACHES[split]
    if cache.exists():
        what = f"compressors' bits per byte. Delete {cache}, and they are computed again"
        kept = read_json_object(cache, what)
        if kept["fingerprint"] == prepared.manifest.fingerprint:
            return kept["bits_per_byte"]
    texts = held_out_texts(prepared.manifest, prepared.tokens_folder, prepared.tokenizer, split)
    found = compressor_bits_per_byte(texts)
    references = {name: sizes["per_file"] for name, sizes in found.items()}
    references |= {f"{name}, all in one": sizes["all_in_one"] for name, sizes in found.items()}
    # Prepared data that several people share may be read-only. Then this is computed at every start.
    if os.access(prepared.tokens_folder, os.W_OK):
        write_json(cache, {"fingerprint": prepared.manifest.fingerprint, "bits_per_byte": references})
    return references


def held_out_texts(
    manifest: shards.Manifest, tokens_folder: Path, tokenizer: Tokenizer, split: str = "validation"
) -> list[bytes]:
    """The documents of a split in stored order, decoded from their ids to UTF-8; at most about `SAMPLE_BYTES`."""
    splits = [source.splits[split] for source in manifest.sources if split in source.splits]
    take_every = max(1, math.ceil(sum(found.bytes for found in splits) / SAMPLE_BYTES))
    documents = itertools.chain.from_iterable(
        shards.read_records(tokens_folder, found.files, manifest.dtype) for found in splits
    )
    pieces = tokenizer.token_bytes
    return [b"".join([pieces[i] for i in ids]) for ids in itertools.islice(documents, 0, None, take_every)]
