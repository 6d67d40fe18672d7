"""The byte-level model as a family."""

from __future__ import annotations

from typing import Any

from smallcoder_jax.config import ComputeConfig, HnetConfig
from smallcoder_jax.layers.ternary import quantize
from smallcoder_jax.models.family import Family
from smallcoder_jax.models.hnet import costs, sharding
from smallcoder_jax.models.hnet.model import Hnet, init_state
from smallcoder_jax.models.hnet.published import PUBLISHED


def init_cache(model: HnetConfig, compute: ComputeConfig, rows: int, positions: int) -> Any:
    """The state of no text. Only attention without a window makes its size depend on how long the text becomes."""
    return init_state(model, rows, positions, compute.dtype)


def attention_shape(model: HnetConfig, length: int) -> tuple[int, int, int] | None:
    if "a" not in model.kinds:
        return None
    for _ in model.inner_widths:
        length = model.room(length)
    shape = model.attention()
    return length, shape.heads // shape.kv_heads, shape.head_size


def recurrence_shapes(model: HnetConfig, length: int) -> list[tuple[int, int]]:
    shapes = []
    for stage, width in enumerate(model.widths):
        innermost = stage == len(model.inner_widths)
        if not innermost or "x" in model.kinds:
            shapes.append((length, width * model.expand_ratio))
        if not innermost:
            shapes.append((length, width))  # the gradients of its chunks, summed over their positions
            length = model.room(length)
            shapes.append((length, width))  # the smoothed outputs of the stage within
    return shapes


def logged(model: HnetConfig) -> tuple[str, ...]:
    stages = range(1, len(model.inner_widths) + 1)
    return ("ratio", *[f"{name}_{stage}" for stage in stages for name in ("boundaries", "overflow", "chunk_length")])


def rates(model: HnetConfig) -> list[tuple[str, float]]:
    """The multipliers of the learning rate, the innermost stage first. The outermost one has the table and the head."""
    stages = [(rf"stage/{'inner/' * depth}.*", rate) for depth, rate in enumerate(model.stage_rates)]
    return [*stages[::-1], (".*", model.stage_rates[0])] if stages else []


HNET = Family(
    module=Hnet,
    init_cache=init_cache,
    sharding=sharding.RULES,
    muon=r".*blocks/.*/kernel",
    flops_per_token=costs.flops_per_token,
    attention_shape=attention_shape,
    recurrence_shapes=recurrence_shapes,
    published=PUBLISHED,
    logged=logged,
    boundaries=Hnet.boundaries,
    rates=rates,
    for_generation=lambda params, compute: quantize(params, compute.dtype),
)
