"""The least time and cost of a step by its roofline: the limits of the hardware, if everything else were free."""

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
    "Everything else is free, and all three overlap: a real step takes longer"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of a step by each limit. `step` is the longest of them, and `mfu` an upper bound."""

    arithmetic: float
    memory: float
    collectives: float
    step: float
    mfu: float
    assumption: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """The least hours and chip-hours for a number of tokens, and the `cost` at a price per chip-hour, if given."""

    tokens: float
    hours: float
    chip_hours: float
    price: float | None
    cost: float | None


def executed_per_token(config: Config, chunks: Choice) -> float:
    """The FLOPs of a step per token, including activations that are recomputed in the backward pass."""
    model, length = config.model, config.train.sequence_length
    flops, without = (family_of(model).flops_per_token(model, size) for size in (length, 0))
    unembedding = 2.0 * model.vocab_size * model.width
    attention = (flops - without) / 3
    again = {"none": 0.0, "dots": attention, "full": flops / 3 - unembedding}[config.compute.remat]
    return flops + again + (unembedding if chunks.chunk is not None else 0.0)


def roofline(
    config: Config, executed: float, moved: float, sent: Traffic, chip: Chip, peak: float, devices: int
) -> Roofline:
    """The roofline of a step. `executed` is in FLOPs per token, `moved` in bytes of a device's memory per step, and
    `peak` in FLOP/s of a device.
    """
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
