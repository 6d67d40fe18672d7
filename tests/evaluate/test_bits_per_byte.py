"""Compressor sizes are those of the real programs' formats, and the weights are right."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.tokens.prepare import prepare
from smallcoder_jax.evaluate import bits_per_byte
from tests.evaluate.conftest import small_config

TEXTS = [b"def f(x):\n    return x\n" * 20, b"", bytes(random.Random(0).randbytes(100))]


def test_sizes_per_file_and_all_in_one() -> None:
    found = bits_per_byte.compressor_bits_per_byte(TEXTS)
    total = sum(map(len, TEXTS))
    files = [text for text in TEXTS if text]
    assert found == {
        "gzip -9": {
            "per_file": 8 * sum(len(gzip.compress(text, 9)) for text in files) / total,
            "all_in_one": 8 * len(gzip.compress(b"".join(files), 9)) / total,
        },
        "xz -9e": {
            "per_file": 8 * sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in files) / total,
            "all_in_one": 8 * len(lzma.compress(b"".join(files), preset=9 | lzma.PRESET_EXTREME)) / total,
        },
    }
    assert found["xz -9e"]["all_in_one"] < found["xz -9e"]["per_file"]


def test_no_text() -> None:
    with pytest.raises(UserError, match="no text to compress"):
        bits_per_byte.compressor_bits_per_byte([b""])


def test_held_out_documents_are_the_validation_files(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(small_config(trained))
    parts = (prepared.manifest, prepared.tokens_folder, prepared.tokenizer)
    texts = bits_per_byte.held_out_texts(*parts)
    written = {path.read_bytes() for path in (trained / "code").iterdir()}
    assert texts
    assert set(texts) < written
    size = sum(source.validation.bytes for source in prepared.manifest.sources)
    assert sum(map(len, texts)) == size
    monkeypatch.setattr(bits_per_byte, "SAMPLE_BYTES", size // 2)
    assert bits_per_byte.held_out_texts(*parts) == texts[::2]


def test_references_are_kept_with_the_data_they_are_of(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(small_config(trained))
    cache = prepared.tokens_folder / bits_per_byte.CACHES["validation"]
    cache.unlink(missing_ok=True)
    first = bits_per_byte.held_out_references(prepared)
    assert list(first) == ["gzip -9", "xz -9e", "gzip -9, all in one", "xz -9e, all in one"]
    kept = json.loads(cache.read_text())
    assert kept["bits_per_byte"] == first
    with monkeypatch.context() as patch:
        patch.delattr(bits_per_byte, "compressor_bits_per_byte")
        assert bits_per_byte.held_out_references(prepared) == first
    cache.write_text(json.dumps({"fingerprint": "of other data", "bits_per_byte": {}}))
    assert bits_per_byte.held_out_references(prepared) == first
