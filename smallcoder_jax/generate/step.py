"""The compiled functions of generation: one prefill per prompt length and one decode step per cache length.

Parameters, sampling settings and the tokenizer's special ids are arguments, so new values need no compilation. `place`
is the sharding of everything but the parameters: their device, or replicated over their mesh.

Shapes: U distinct prompts, B rows, P prompt columns, V vocabulary.
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
    """Distinct prompts without their last tokens, padded on the left, and the rows that continue them.

    The first decode step reads the last tokens. A row's random numbers depend on its seed, a hash of its prompt and its
    sample number, but not on its place in the batch. `unused_B` marks rows that only fill up the batch.
    """

    tokens_UP: Array  # int32
    segment_ids_UP: Array  # int32: 1, and 0 on padding
    prompt_of_B: Array  # int32: index of the row's prompt
    last_B: Array  # int32
    unused_B: Array  # bool
    seeds_B: Array  # uint32
    prompt_hashes_B: Array  # uint32
    samples_B: Array  # uint32


class Vocabulary(NamedTuple):
    """The properties of a tokenizer's ids that decoding needs."""

    suppressed_V: Array  # bool: never produced
    ends_V: Array  # bool: finishes the row that produces it
    pad_id: Array  # int32: what a finished row produces


class State(NamedTuple):
    """The state that one step passes to the next. It is donated."""

    cache: Cache
    positions_B: Array  # of the tokens that the next step reads
    ended_B: Array
    seen_BV: Array  # prompt and completion so far, for the repetition penalty
    keys_B: Array
    count: Array  # tokens produced


class Produced(NamedTuple):
    """One token per row, and its log-probability under the model itself, before penalty, temperature and cuts."""

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
    """Reads each prompt once into a new cache of `length` columns, even if several rows continue it."""
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
    """Reads one token per row and produces the next. Finished rows read padding, which no token attends to."""
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
    # Without the constraint, prefill and decode could return differently sharded states, and decode would be compiled
    # twice.
    return jax.lax.with_sharding_constraint((state, produced), place)


def _row_key(seed: Array, prompt_hash: Array, sample: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_hash), sample)
