"""Whether what a model of bytes writes is text: UTF-8 that decodes without a replacement."""

from __future__ import annotations

from collections.abc import Sequence

from smallcoder_jax.generate.engine import Completion
from smallcoder_jax.tokenizers.base import Tokenizer


def writes_bytes(tokenizer: Tokenizer) -> bool:
    """Whether every id stands for one byte at most, so that a model has to learn UTF-8."""
    return all(len(piece) <= 1 for piece in tokenizer.token_bytes)


def utf8_measures(completions: Sequence[Completion], tokenizer: Tokenizer) -> dict[str, float]:
    """Shares of completions: `utf8_validity` of those whose bytes decode strictly, without the token that ended them,
    and `utf8_cut_off` of those that are valid except for a last character that `max_tokens` cut off. The remaining ones
    are invalid. Empty for a tokenizer with entries of several bytes, and without completions.
    """
    if not completions or not writes_bytes(tokenizer):
        return {}
    faults = [_fault(completion, tokenizer) for completion in completions]
    return {
        "utf8_validity": faults.count("") / len(faults),
        "utf8_cut_off": faults.count("cut off") / len(faults),
    }


def _fault(completion: Completion, tokenizer: Tokenizer) -> str:
    written = b"".join(tokenizer.token_bytes[i] for i in completion.token_ids)
    try:
        written.decode("utf-8")
    except UnicodeDecodeError as error:
        # Only the end of the bytes is reported in this way, and only if all before it is valid.
        at_the_end = error.reason == "unexpected end of data"
        return "cut off" if at_the_end and completion.finish_reason == "length" else "invalid"
    return ""
