"""Sums of losses over evaluation batches, as a CLU metric, and what they come to."""

import math
from collections.abc import Mapping
from typing import Any, Self

import clu.metrics
from flax import struct


@struct.dataclass
class EvalMetrics(clu.metrics.Metric):
    """Sums of a loss over batches, by name; merging two gives exactly the sums over both.

    The sums are Python floats on the host: merging touches no device, and adds in double precision.
    """

    sums: dict[str, float]

    @classmethod
    def from_model_output(cls, **sums: Any) -> Self:
        """From the sums of one batch: Python numbers or host arrays of one element."""
        return cls({name: float(value) for name, value in sums.items()})

    @classmethod
    def empty(cls) -> Self:
        return cls({})

    def merge(self, other: Self) -> Self:
        names = self.sums.keys() | other.sums.keys()
        return type(self)({name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in sorted(names)})

    def compute(self) -> dict[str, float]:
        """The sums themselves: what they come to, a stage knows (`Task.summarise`)."""
        return dict(self.sums)


def language_summary(sums: Mapping[str, float]) -> dict[str, float]:
    """From the sums of `losses.language_model`, with `weight` and, where they are known, UTF-8 `bytes`: loss (nats per
    token), perplexity, bits_per_byte, accuracy and top5_accuracy; NaN where nothing counted.
    """
    loss = ratio(sums["nats"], sums["weight"])
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan,
        **({"bits_per_byte": ratio(sums["nats"] / math.log(2), sums["bytes"])} if "bytes" in sums else {}),
        "accuracy": ratio(sums["accuracy"], sums["weight"]),
        "top5_accuracy": ratio(sums["top5_accuracy"], sums["weight"]),
    }


def ratio(total: float, count: float) -> float:
    """The quotient; NaN where nothing counted."""
    return total / count if count else math.nan
