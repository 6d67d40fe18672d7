"""The decoder's implementation of the `Family` interface."""

from __future__ import annotations

from smallcoder_jax.models.decoder import costs, sharding
from smallcoder_jax.models.decoder.cache import init_cache
from smallcoder_jax.models.decoder.model import Decoder
from smallcoder_jax.models.decoder.published import PUBLISHED
from smallcoder_jax.models.family import Family

DECODER = Family(
    module=Decoder,
    init_cache=init_cache,
    sharding=sharding.RULES,
    muon=r"blocks/.*/kernel",
    flops_per_token=costs.flops_per_token,
    attention_shape=lambda model, length: (length, model.heads // model.kv_heads, model.head_size),
    published=PUBLISHED,
)
