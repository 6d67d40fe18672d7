"""What is compiled: one prefill per prompt length and one decode step per cache length.

Parameters, sampling settings and the tokenizer's special ids are arguments, so new values of them compile nothing.
`place` is where everything but the parameters lives: their device, or every device of their mesh.

Shapes: U different prompts, B rows, P prompt columns, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.generate.sampling import Settings, choose
from smallcoder_jax.models.build import Params, abstract_model, bind, logits
from smallcoder_jax.models.families import family_of
from smallcoder_jax.models.family import Cache


class Prompts(NamedTuple):
    """Different prompts without their last tokens, padded on the left, and the rows that go on from them: the first
    decode step reads the last ones.

    A row's random numbers come from its seed, a number made of its prompt, and which sample of it the row is: not
    from where in a batch it stands. `unused_B` marks rows that only fill up the batch.
    """

    tokens_UP: Array  # int32
    segment_ids_UP: Array  # int32: 1, and 0 on padding
    prompt_of_B: Array  # int32: a row's place among the prompts
    last_B: Array  # int32
    unused_B: Array  # bool
    seeds_B: Array  # uint32
    prompt_hashes_B: Array  # uint32
    samples_B: Array  # uint32


class Vocabulary(NamedTuple):
    """What a tokenizer's ids mean to a model."""

    suppressed_V: Array  # bool: never produced
    ends_V: Array  # bool: a row that produced it is done
    pad_id: Array  # int32: what a row that is done produces


class State(NamedTuple):
    """Everything that one step hands to the next; donated."""

    cache: Cache
    positions_B: Array  # of the tokens that the next step reads
    ended_B: Array
    seen_BV: Array  # prompt and completion so far, for the repetition penalty
    keys_B: Array
    count: Array  # tokens produced


class Produced(NamedTuple):
    """One token per row, and its log-probability under the model itself: before penalty, temperature and cuts."""

    tokens_B: Array
    logprobs_B: Array


@functools.partial(jax.jit, static_argnames=("model", "compute", "place", "length"))
def prefill(
    params: Params,
    prompts: Prompts,
    *,
    model: ModelConfig,
    compute: ComputeConfig,
    place: jax.sharding.Sharding,
    length: int,
) -> State:
    """Reads the prompts into a new cache of `length` columns, each once, however many rows go on from it."""
    module = bind(abstract_model(model, compute)[0], params)
    count, of_B = prompts.tokens_UP.shape[0], prompts.prompt_of_B
    positions_UP = jnp.maximum(jnp.cumsum(prompts.segment_ids_UP, axis=1) - 1, 0)
    cache = family_of(model).init_cache(model, compute, count, length)
    _, cache = module.extend(prompts.tokens_UP, positions_UP, prompts.segment_ids_UP, cache)
    prompt_U = jnp.arange(count, dtype=jnp.int32)
    seen_UV = jnp.zeros((count, model.vocab_size), bool)
    seen_UV = seen_UV.at[prompt_U[:, None], prompts.tokens_UP].max(prompts.segment_ids_UP > 0)
    row_B = jnp.arange(of_B.shape[0], dtype=jnp.int32)
    state = State(
        cache=jax.tree.map(lambda of_prompts: of_prompts[of_B] if of_prompts.ndim else of_prompts, cache),
        positions_B=prompts.segment_ids_UP.sum(axis=1)[of_B],
        ended_B=prompts.unused_B,
        seen_BV=seen_UV[of_B].at[row_B, prompts.last_B].set(True),
        keys_B=jax.vmap(_row_key)(prompts.seeds_B, prompts.prompt_hashes_B, prompts.samples_B),
        count=jnp.zeros((), jnp.int32),
    )
    return jax.lax.with_sharding_constraint(state, place)


@functools.partial(jax.jit, static_argnames=("model", "compute", "place"), donate_argnames=("state",))
def decode(
    params: Params,
    state: State,
    tokens_B: Array,
    settings: Settings,
    vocabulary: Vocabulary,
    *,
    model: ModelConfig,
    compute: ComputeConfig,
    place: jax.sharding.Sharding,
) -> tuple[State, Produced]:
    """Reads one token per row and produces the next. Rows that are done read padding, which nothing sees."""
    module = bind(abstract_model(model, compute)[0], params)
    alive_B = jnp.logical_not(state.ended_B).astype(jnp.int32)
    hidden_B1D, cache = module.extend(tokens_B[:, None], state.positions_B[:, None], alive_B[:, None], state.cache)
    logits_BV = logits(module, hidden_B1D)[:, 0]
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.count)
    chosen_B = choose(logits_BV, state.seen_BV, vocabulary.suppressed_V, settings, keys_B)
    chosen_logit_B = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=1)[:, 0]
    produced = Produced(
        tokens_B=jnp.where(state.ended_B, vocabulary.pad_id, chosen_B),
        logprobs_B=chosen_logit_B - jax.nn.logsumexp(logits_BV, axis=1),
    )
    state = State(
        cache=cache,
        positions_B=state.positions_B + alive_B,
        ended_B=state.ended_B | vocabulary.ends_V[produced.tokens_B],
        seen_BV=state.seen_BV.at[jnp.arange(tokens_B.shape[0], dtype=jnp.int32), produced.tokens_B].set(True),
        keys_B=state.keys_B,
        count=state.count + 1,
    )
    # Split as the compiler likes, a mesh's state would come out of prefill unlike out of decode: two compilations.
    return jax.lax.with_sharding_constraint((state, produced), place)


def _row_key(seed: Array, prompt_hash: Array, sample: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_hash), sample)
