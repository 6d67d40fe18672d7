"""What general compressors need for the same text: numbers beside which a model's bits per byte can be placed."""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from smallcoder_jax.errors import UserError


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

    Both are over the total bytes, so that a long text counts more than a short one; empty texts are left out, as a
    model that predicts bytes has none to predict in them. The compressors release the interpreter lock: all cores work.
    Raises UserError where there is no text.
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
