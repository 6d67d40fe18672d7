"""Fill-in-the-middle: rearranges documents so that a next-token model learns to fill a gap.

Bavarian et al. 2022 (arXiv 2207.14255), section 3: a document is cut at two uniformly sampled characters into prefix,
middle and suffix. Both common orders are supported:

    PSM   <s> <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle </s>
    SPM   <s> <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle </s>

SPM is the variant of the paper's appendix D that SantaCoder, StarCoder and Code Llama use. It starts like a PSM
document with an empty prefix, so that training on one order helps the other, and the middle directly continues the
prefix.

A user's cursor is between characters, not between tokens, so that the cuts are sampled over characters. Only the few
tokens around a cut are encoded again. The parts hold exactly the document's bytes, with the ids that each part would
have when encoded separately. The exception is byte-level BPE, whose splitting by a regular expression looks ahead:
whitespace at the edge of what is encoded again may have other ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers.base import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer

MIN_CHARACTERS = 10  # shorter documents are not rearranged


class FillInTheMiddle:
    """Rearranges a share `rate` of the documents: a share `spm_share` of these as SPM, the rest as PSM.

    Raises UserError for a tokenizer without the three pieces that mark the parts.
    """

    def __init__(self, tokenizer: Tokenizer, *, rate: float, spm_share: float):
        missing = [piece for piece in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE) if piece not in tokenizer.specials]
        if missing:
            raise UserError(
                f"data.fim_rate={rate} needs a tokenizer with {', '.join(missing)}, which this one lacks; "
                "set data.fim_rate=0 or use a tokenizer that has them"
            )
        self._tokenizer = tokenizer
        self._rate = rate
        self._spm_share = spm_share
        self._prefix_id = tokenizer.specials[FIM_PREFIX]
        self._suffix_id = tokenizer.specials[FIM_SUFFIX]
        self._middle_id = tokenizer.specials[FIM_MIDDLE]
        # For each id, the number of characters that begin in it.
        self._characters = np.array([len(_character_starts(piece)) for piece in tokenizer.token_bytes], np.int32)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`ids`, one document with BOS and EOS, unchanged or rearranged; the same for the same state of `rng`."""
        if rng.random() >= self._rate:
            return ids
        body = ids[1:-1]
        characters = np.cumsum(self._characters[body])
        if len(body) == 0 or characters[-1] < MIN_CHARACTERS:
            return ids
        first, second = np.sort(rng.integers(0, characters[-1] + 1, size=2))
        prefix, middle, suffix = self._split(body, characters, int(first), int(second))
        if rng.random() < self._spm_share:
            parts = [self._prefix_id, self._suffix_id], suffix, [self._middle_id], prefix, middle
        else:
            parts = [self._prefix_id], prefix, [self._suffix_id], suffix, [self._middle_id], middle
        return np.concatenate([ids[:1], *parts, ids[-1:]], dtype=ids.dtype, casting="unsafe")

    def split(self, body: np.ndarray, first: int, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of prefix, middle and suffix of `body` (without BOS and EOS), cut before the characters `first` and
        `second`."""
        return self._split(body, np.cumsum(self._characters[body]), first, second)

    def _split(
        self, body: np.ndarray, characters: np.ndarray, first: int, second: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stops = np.flatnonzero(self._tokenizer.borders(body))
        token_1, byte_1 = self._locate(body, characters, first)
        token_2, byte_2 = self._locate(body, characters, second)
        start_1, end_1 = _window(stops, len(body), token_1, byte_1)
        start_2, end_2 = _window(stops, len(body), token_2, byte_2)
        left_1, right_1 = self._cut(body[start_1:end_1], token_1 - start_1, byte_1)
        left_2, right_2 = self._cut(body[start_2:end_2], token_2 - start_2, byte_2)
        if (start_1, end_1) == (start_2, end_2):
            middle = self._encode(left_2[len(left_1) :])
        else:
            middle = np.concatenate([self._encode(right_1), body[end_1:start_2], self._encode(left_2)])
        prefix = np.concatenate([body[:start_1], self._encode(left_1)])
        suffix = np.concatenate([self._encode(right_2), body[end_2:]])
        return prefix, middle, suffix

    def _locate(self, body: np.ndarray, characters: np.ndarray, character: int) -> tuple[int, int]:
        """The token in which a character begins, and the offset of its first byte there. For the end of the text, the
        end of `body` and 0."""
        token = int(np.searchsorted(characters, character, side="right"))
        if token == len(body):
            return token, 0
        before = int(characters[token - 1]) if token else 0
        return token, _character_starts(self._tokenizer.token_bytes[body[token]])[character - before]

    def _cut(self, window: np.ndarray, token: int, byte: int) -> tuple[bytes, bytes]:
        pieces = [self._tokenizer.token_bytes[id] for id in window]
        cut = sum(map(len, pieces[:token])) + byte
        text = b"".join(pieces)
        return text[:cut], text[cut:]

    def _encode(self, text: bytes) -> np.ndarray:
        return np.array(self._tokenizer.encode(text.decode("utf-8")) if text else [], np.int64)


def _window(stops: np.ndarray, length: int, token: int, byte: int) -> tuple[int, int]:
    """The smallest range of tokens around a cut whose ids the cut can change; empty where it changes none."""
    after = int(np.searchsorted(stops, token, side="right"))
    start = int(stops[after - 1]) if after else 0
    if token == length or (byte == 0 and start == token):
        return token, token
    return start, int(stops[after]) if after < len(stops) else length


def _character_starts(piece: bytes) -> Sequence[int]:
    """The offsets at which characters begin in UTF-8: all other bytes of a character are 10xxxxxx."""
    return range(len(piece)) if piece.isascii() else [i for i, byte in enumerate(piece) if byte & 0xC0 != 0x80]
