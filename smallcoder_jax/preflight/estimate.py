"""Least time and cost of a step by its roofline: what the hardware's limits allow, were everything else free."""

from __future__ import annotations

import dataclasses

from smallcoder_jax.config import Config
from smallcoder_jax.models.families import family_of
from smallcoder_jax.ops.cross_entropy import Choice
from smallcoder_jax.preflight.collectives import Traffic
from smallcoder_jax.preflight.target import Chip

ASSUMPTION = (
    "the longest of: arithmetic at the bf16 peak; arguments read, results written and temporaries written and read "
    "once per microbatch at the memory's bandwidth; collectives by the ring algorithm over all links. "
    "Everything else free, all three at once: a real step takes longer"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, at least, by each limit; `mfu` at most. `step` is the longest."""

    arithmetic: float
    memory: float
    collectives: float
    step: float
    mfu: float
    assumption: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """For so many tokens: hours and chip-hours, at least; `cost` at a price per chip-hour, where one was given."""

    tokens: float
    hours: float
    chip_hours: float
    price: float | None
    cost: float | None


def executed_per_token(config: Config, chunks: Choice) -> float:
    """FLOPs of a step per token, with what is computed again in the backward pass."""
    model, length = config.model, config.train.sequence_length
    flops, without = (family_of(model).flops_per_token(model, size) for size in (length, 0))
    unembedding = 2.0 * model.vocab_size * model.width
    attention = (flops - without) / 3
    again = {"none": 0.0, "dots": attention, "full": flops / 3 - unembedding}[config.compute.remat]
    return flops + again + (unembedding if chunks.chunk is not None else 0.0)


def roofline(
    config: Config, executed: float, moved: float, sent: Traffic, chip: Chip, peak: float, devices: int
) -> Roofline:
    """`executed`: FLOPs per token; `moved`: bytes of a device's memory per step; `peak`: FLOP/s of a device."""
    tokens = config.train.batch_size * config.train.sequence_length
    arithmetic = executed * tokens / devices / peak
    memory = moved / chip.bandwidth
    collectives = sum(max(each.sent / chip.link, each.between_hosts / chip.network) for each in sent.collectives)
    step = max(arithmetic, memory, collectives)
    mfu = (
        family_of(config.model).flops_per_token(config.model, config.train.sequence_length)
        * tokens
        / (devices * peak * step)
    )
    return Roofline(arithmetic, memory, collectives, step, mfu, ASSUMPTION)


def budget(config: Config, step: float, tokens: float, devices: int, price: float | None) -> Budget:
    hours = tokens / (config.train.batch_size * config.train.sequence_length) * step / 3600
    return Budget(tokens, hours, hours * devices, price, None if price is None else hours * devices * price)
