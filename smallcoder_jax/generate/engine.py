"""Generates completions of prompts: batching, dispatching steps ahead, and stopping rows on the host.

Shapes: U different prompts, B rows, P prompt columns, V vocabulary.
"""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import math
import time
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from smallcoder_jax.base.errors import NotFinite, UserError
from smallcoder_jax.base.lengths import bucket, power_of_two
from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.generate import prompts as prompting
from smallcoder_jax.generate import step
from smallcoder_jax.generate.prompts import Prompt, Room
from smallcoder_jax.generate.sampling import SamplingOptions, settings_of
from smallcoder_jax.generate.text import TextStream
from smallcoder_jax.models.build import Params
from smallcoder_jax.models.families import family_of
from smallcoder_jax.tokenizers.base import TOOL_PIECES, Tokenizer, end_ids
from smallcoder_jax.tokenizers.chat import Conversation

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of a prompt by a model.

    `text` ends before a stop string and holds no special pieces. `token_ids` are all generated tokens, including the
    end token, and `logprobs` are their natural log-probabilities under the model itself. The `repr` omits both.
    `finish_reason` is "stop" after an end token or a stop string, and "length" after `max_tokens`. `tokens_per_second`
    is the decoding rate of this completion: the number of tokens after the first, divided by the time from the first to
    the last token; 0 when there is only one token.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...] = dataclasses.field(repr=False)
    logprobs: tuple[float, ...] = dataclasses.field(repr=False)
    finish_reason: FinishReason
    tokens_per_second: float
    prompt_tokens: int
    dropped_prompt_tokens: int


class Generator:
    """Generates text with a model.

    Takes the unrolled parameters and copies none of them but those that the family prepares for generation. Cheap to
    create, because all generators of the same shapes share their compiled functions: a training loop creates one from
    the current parameters whenever it needs samples.
    """

    def __init__(self, model: ModelConfig, compute: ComputeConfig, params: Params, tokenizer: Tokenizer):
        if tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} entries, but {model.vocab_size=}; use the tokenizer that "
                "the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self._compute = dataclasses.replace(compute, layers="unroll", remat="none")
        params = jax.tree.map(jnp.asarray, params)  # moves host arrays once; device arrays stay
        self._params = family_of(model).for_generation(params, self._compute)
        self._place = _replicated_like(self._params)
        self._end_ids = frozenset(end_ids(tokenizer))
        self._vocabulary = _vocabulary_of(tokenizer, self._end_ids, model.vocab_size, self._place)

    def generate(
        self, prompts: abc.Sequence[str | abc.Sequence[int] | Prompt], options: SamplingOptions, batch_size: int = 8
    ) -> list[Completion]:
        """`options.num_samples` completions of each prompt, in the order of the prompts.

        A text prompt gets a BOS in front, and ids are used as they are. `batch_size` rows, of similar length, are
        decoded at a time, and a prompt that several of them share is read once. The same seed, prompt and sample number
        give the same text in every batch. Raises UserError for a prompt that does not fit.
        """
        if batch_size < 1:
            raise UserError(f"{batch_size=} must be at least 1")
        ready = [self._prompt(prompt, options) for prompt in prompts]
        rows = [_Row(prompt, sample, options) for prompt in ready for sample in range(options.num_samples)]
        by_length = sorted(rows, key=lambda row: len(row.prompt.ids))
        for start in range(0, len(rows), batch_size):
            for _ in self._run(by_length[start : start + batch_size], options, batch_size):
                pass
        return [row.completion() for row in rows]

    def generate_fim(self, prefix: str, suffix: str, options: SamplingOptions) -> list[Completion]:
        """Fills the gap between `prefix` and `suffix`. Raises UserError when the tokenizer has no FIM pieces."""
        return self.generate([self.fim_prompt(prefix, suffix, options)], options)

    def stream(
        self, prompt: str | abc.Sequence[int] | Prompt, options: SamplingOptions
    ) -> abc.Generator[str, None, Completion]:
        """Yields the text of one completion, in whole characters, as it is generated. Returns the completion."""
        row = self._one_row(prompt, options)
        for pieces in self._run([row], options, 1):
            if pieces[0]:
                yield pieces[0]
        return row.completion()

    def stream_ids(self, prompt: Prompt, options: SamplingOptions) -> abc.Generator[int, None, Completion]:
        """Yields the ids of one completion as they are generated, including the end token. Returns the completion."""
        row = self._one_row(prompt, options)
        for _ in self._run([row], options, 1):
            yield row.token_ids[-1]
        return row.completion()

    def chat_prompt(self, conversation: Conversation, options: SamplingOptions) -> Prompt:
        """The prompt that asks for the assistant's next turn, for `generate`, `stream` and `stream_ids`."""
        return prompting.next_turn(self.tokenizer, conversation, self._room(options))

    def fim_prompt(self, prefix: str, suffix: str, options: SamplingOptions) -> Prompt:
        """The prompt that asks for the text between `prefix` and `suffix`, for `generate` and `stream`."""
        return prompting.fill_in_middle(self.tokenizer, prefix, suffix, self._room(options))

    def _one_row(self, prompt: str | abc.Sequence[int] | Prompt, options: SamplingOptions) -> _Row:
        if options.num_samples != 1:
            raise UserError(f"num_samples={options.num_samples}: a stream has one completion; use generate for more")
        return _Row(self._prompt(prompt, options), 0, options)

    def _prompt(self, prompt: str | abc.Sequence[int] | Prompt, options: SamplingOptions) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            return prompting.from_text(self.tokenizer, prompt, self._room(options))
        return prompting.from_ids(self.tokenizer, prompt, self._room(options))

    def _room(self, options: SamplingOptions) -> Room:
        return Room(self.model.context, options.max_tokens, options.truncate_prompt)

    def _run(self, rows: list[_Row], options: SamplingOptions, batch_size: int) -> abc.Iterator[list[str]]:
        """Decodes rows until all are finished; yields the new text of each row after every step."""
        for tokens_B, logprobs_B in self._steps(rows, options, batch_size):
            now = time.perf_counter()
            yield [
                "" if row.finish_reason else row.accept(int(token), float(logprob), now, self._bytes_of(int(token)))
                for row, token, logprob in zip(rows, tokens_B, logprobs_B, strict=False)  # the other rows are padding
            ]
            if all(row.finish_reason for row in rows):
                return

    def _steps(
        self, rows: list[_Row], options: SamplingOptions, batch_size: int
    ) -> abc.Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens and log-probabilities of every step. Each step is dispatched before the results of the previous
        one are read, so that the device never waits for the host.
        """
        size = min(power_of_two(len(rows)), batch_size)
        width = min(bucket(max(len(row.prompt.ids) for row in rows) - 1), self.model.context)
        shape = {"model": self.model, "compute": self._compute, "place": self._place}
        settings, vocabulary = settings_of(options, size, self._place), self._vocabulary
        packed = _pack_rows(rows, size, width, self.tokenizer.pad_id, self._place)
        state = step.prefill(self._params, packed, **shape, length=width + bucket(options.max_tokens))
        state, produced = step.decode(self._params, state, packed.last_B, settings, vocabulary, **shape)
        for _ in range(options.max_tokens - 1):
            state, following = step.decode(self._params, state, produced.tokens_B, settings, vocabulary, **shape)
            yield jax.device_get(produced)
            produced = following
        yield jax.device_get(produced)

    def _bytes_of(self, token: int) -> bytes | None:
        """The bytes of a token; None for an end token."""
        return None if token in self._end_ids else self.tokenizer.token_bytes[token]


class _Row:
    """The host's state of one completion that is being generated."""

    def __init__(self, prompt: Prompt, sample: int, options: SamplingOptions):
        self.prompt, self.sample, self.seed = prompt, sample, options.seed
        self.finish_reason: FinishReason | None = None
        self._max_tokens = options.max_tokens
        self._stream = TextStream(options.stop)
        self._text = ""
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._first = self._last = 0.0  # times in seconds at which the first and the last token arrived

    def accept(self, token: int, logprob: float, now: float, token_bytes: bytes | None) -> str:
        """Adds the next token; returns the text that is final with it."""
        if not math.isfinite(logprob):
            raise NotFinite(
                f"the model's scores after {len(self.prompt.ids) + len(self.token_ids)} tokens are not finite "
                "numbers; its training diverged or its file is damaged: use an earlier checkpoint"
            )
        self._first, self._last = (now if not self.token_ids else self._first), now
        self.token_ids.append(token)
        self._logprobs.append(logprob)
        piece = "" if token_bytes is None else self._stream.push(token_bytes)
        if token_bytes is None or self._stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self._stream.finish()
        self._text += piece
        return piece

    def completion(self) -> Completion:
        """The completion of the finished row. Its decoding rate starts at the first token, so it includes neither the
        prefill nor compilation.
        """
        seconds = self._last - self._first
        return Completion(
            prompt=self.prompt.text,
            text=self._text,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish_reason or "length",
            tokens_per_second=(len(self.token_ids) - 1) / seconds if seconds > 0 else 0.0,
            prompt_tokens=len(self.prompt.ids),
            dropped_prompt_tokens=self.prompt.dropped,
        )


def _vocabulary_of(
    tokenizer: Tokenizer, ends: abc.Set[int], vocab_size: int, place: jax.sharding.Sharding
) -> step.Vocabulary:
    """The vocabulary on the device. Ids without text are suppressed, unless they end a row or call a tool."""
    tool_ids = {tokenizer.specials[piece] for piece in TOOL_PIECES if piece in tokenizer.specials}
    suppressed_V = np.ones(vocab_size, bool)
    suppressed_V[: tokenizer.vocab_size] = [not piece for piece in tokenizer.token_bytes]
    suppressed_V[[tokenizer.pad_id, tokenizer.bos_id, *tokenizer.specials.values()]] = True
    suppressed_V[[*ends, *tool_ids]] = False
    ends_V = np.zeros(vocab_size, bool)
    ends_V[list(ends)] = True
    return step.Vocabulary(*jax.device_put((suppressed_V, ends_V, np.int32(tokenizer.pad_id)), place))


def _pack_rows(rows: list[_Row], size: int, width: int, pad_id: int, place: jax.sharding.Sharding) -> step.Prompts:
    """Packs the distinct prompts, without their last tokens, at the right of `width` columns, and `size` rows, of which
    those after `rows` are unused.
    """
    places = {ids: i for i, ids in enumerate(dict.fromkeys(row.prompt.ids for row in rows))}
    shape = (min(power_of_two(len(places)), size), width)
    tokens_UP, segment_ids_UP = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    for ids, i in places.items():
        start = width - (len(ids) - 1)
        tokens_UP[i, start:], segment_ids_UP[i, start:] = ids[:-1], 1
    prompt_of_B, last_B = np.zeros(size, np.int32), np.full(size, pad_id, np.int32)
    unused_B = np.arange(size) >= len(rows)
    seeds_B, prompt_hashes_B, samples_B = np.zeros((3, size), np.uint32)
    for i, row in enumerate(rows):
        ids = row.prompt.ids
        prompt_of_B[i], last_B[i], seeds_B[i], samples_B[i] = places[ids], ids[-1], row.seed, row.sample
        prompt_hashes_B[i] = zlib.crc32(np.asarray(ids, np.int32).tobytes())
    columns = (tokens_UP, segment_ids_UP, prompt_of_B, last_B, unused_B, seeds_B, prompt_hashes_B, samples_B)
    return step.Prompts(*jax.device_put(columns, place))


def _replicated_like(params: Params) -> jax.sharding.Sharding:
    """The sharding of small inputs: on the device of the parameters, or replicated over their mesh."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
