"""A small trained tokenizer and random models of every exportable kind."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from smallcoder_jax.config import DecoderConfig
from smallcoder_jax.models import build
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tests.helpers import FLOAT32

CODE = """
def fibonacci(n):
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)


class Stack:
\tdef __init__(self, items=None):
\t\tself.items = list(items or [])

    def push(self, item):
        self.items.append(item)  # amortised O(1)

=====  -----  ###
"""


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece([CODE] * 4, 420, 100_000)


def llama(**changes: Any) -> DecoderConfig:
    shape = {"vocab_size": 420, "width": 64, "mlp_width": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 32}
    return DecoderConfig(**{**shape, "context": 160, "rope_theta": 123_456.0, **changes})


def gpt2(**changes: Any) -> DecoderConfig:
    kinds = {"norm": "layernorm", "norm_eps": 1e-5, "positions": "learned", "mlp": "gelu", "bias": "all"}
    return llama(**{**kinds, "kv_heads": 4, "head_size": 16, "rope_theta": 10_000.0, **changes})


MODELS = {
    "llama": llama(),
    "llama-untied-biased": llama(embeddings="untied", bias="all", context=48),
    "gpt2": gpt2(),
    "gpt2-untied": gpt2(embeddings="untied", dropout=0.1),
}


def random_params(model: DecoderConfig, seed: int = 0) -> build.Params:
    """Parameters in which nothing is 0 or 1, so that a bias or a scale that is left out shows."""
    params = build.init_params(model, FLOAT32, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)
