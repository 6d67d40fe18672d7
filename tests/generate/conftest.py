"""A tiny random model over bytes: what generation is tested with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.models import build
from smallcoder_jax.tokenizers.bytes import ByteTokenizer

COMPUTE = ComputeConfig(dtype="float32")
MODEL = ModelConfig(
    vocab_size=256, width=64, mlp_width=96, layers=2, heads=4, kv_heads=2, head_size=16, context=96, norm_eps=1e-6
)


class Tiny:
    """Makes generators of the tiny model, and keeps its parameters for computing what is expected."""

    def __init__(self, **changes):
        self.model = dataclasses.replace(MODEL, **changes)
        self.params = build.init_params(self.model, COMPUTE, jax.random.key(7))
        self._forward = jax.jit(self._score)

    def generator(self, tokenizer=None, params=None) -> Generator:
        return Generator(self.model, COMPUTE, params or self.params, tokenizer or ByteTokenizer())

    def scores(self, ids: list[int]) -> np.ndarray:
        """Scores after every token of one document, by the forward pass of training: [tokens, V]."""
        row = np.zeros((1, self.model.context), np.int32)
        row[0, : len(ids)] = ids
        segments = (np.arange(self.model.context, dtype=np.int32) < len(ids)).astype(np.int32)[None]
        return np.array(self._forward(self.params, row, segments)[0, : len(ids)])

    def _score(self, params, tokens, segments):
        graph, _ = build.abstract_model(self.model, COMPUTE)
        positions = jnp.arange(self.model.context, dtype=jnp.int32)[None]
        decoder = build.bind(graph, params)
        return decoder.logits(decoder(tokens, positions, segments))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def make_tiny():
    return functools.cache(Tiny)


def bytes_ending_at(token: int) -> ByteTokenizer:
    """A byte tokenizer whose EOS is `token`, so that a random model can be made to end where it is known to go."""
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = token
    return tokenizer


@pytest.fixture(scope="session")
def ending_at():
    return bytes_ending_at
