"""A tiny random model over bytes, and one that writes what a test says: what generation is tested with."""

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import ComputeConfig, DecoderConfig
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.models import build
from smallcoder_jax.tokenizers.base import IM_END
from smallcoder_jax.tokenizers.bytes import ByteTokenizer

COMPUTE = ComputeConfig(dtype="float32")
MODEL = DecoderConfig(
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
        return build.logits(decoder, decoder(tokens, positions, segments).states_BTD)


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


class CallingTokenizer(ByteTokenizer):
    """Bytes, and the pieces of calls."""

    def __init__(self) -> None:
        super().__init__(tools=True)

    def ids_of(self, *parts: str | bytes) -> list[int]:
        """The ids of what a model may write: names of pieces, text, and bytes."""
        ids: list[int] = []
        for part in parts:
            named = [self.specials[part]] if isinstance(part, str) and part in self.specials else None
            ids += named or list(part.encode() if isinstance(part, str) else part)
        return ids


class Scripted(Generator):
    """A generator whose model writes the given answers, one after the other; `asked` has the prompts. Ctrl-C is pressed
    where an answer has the id -1."""

    def __init__(self, *answers: Sequence[int], context: int = 10_000):
        self.tokenizer = CallingTokenizer()
        self.model = dataclasses.replace(MODEL, vocab_size=self.tokenizer.vocab_size, context=context)
        self._end_ids = frozenset({self.tokenizer.eos_id, self.tokenizer.specials[IM_END]})
        self._answers = iter(answers)
        self.asked: list[list[int]] = []

    def _steps(self, rows, options, batch_size) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.asked += [list(row.prompt.ids) for row in rows]
        answers = [next(self._answers) for _ in rows]
        for step in range(options.max_tokens):
            tokens = [answer[step] if step < len(answer) else self.tokenizer.pad_id for answer in answers]
            if -1 in tokens:
                raise KeyboardInterrupt
            yield np.array(tokens), np.zeros(len(tokens), np.float32)


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture(scope="session")
def terminal() -> type[Terminal]:
    return Terminal
