"""Decoding and borders, computed from the bytes that every id stands for, for any tokenizer.

Byte-pair encoding merges neighbours only where the merged bytes are an entry. Where no entry of the vocabulary contains
byte a directly followed by byte b, no id ever covers both, and a text may be cut between them. The bytes on either side
stay the same. The ids do too, except for tokenizers that first split a text by a regular expression (byte-level BPE),
because an expression that looks ahead may split whitespace before the cut differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CONTINUATION = slice(0x80, 0xC0)  # bytes inside a UTF-8 character: a text is never cut before one


class Vocabulary:
    """The bytes of every id, `token_bytes`, and the tables that are computed from them once."""

    def __init__(self, token_bytes: Sequence[bytes]):
        self.token_bytes = list(token_bytes)
        joins = np.zeros((256, 256), dtype=bool)
        for piece in self.token_bytes:
            values = np.frombuffer(piece, dtype=np.uint8)
            joins[values[:-1], values[1:]] = True
        joins[:, _CONTINUATION] = True
        special = np.array([not piece for piece in self.token_bytes], dtype=bool)
        self._first = np.array([piece[0] if piece else 0 for piece in self.token_bytes], dtype=np.uint8)
        self._joins = joins
        self._special = special
        self._last = np.array([piece[-1] if piece else 0 for piece in self.token_bytes], dtype=np.uint8)

    def borders(self, ids: np.ndarray) -> np.ndarray:
        """For each id, whether no id can cover the bytes on both sides of the position before it (bool)."""
        ids = np.asarray(ids, dtype=np.int64)
        cut = np.ones(ids.shape, dtype=bool)
        before, after = ids[:-1], ids[1:]
        cut[1:] = ~self._joins[self._last[before], self._first[after]] | self._special[before] | self._special[after]
        return cut

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Specials are omitted, and invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")
