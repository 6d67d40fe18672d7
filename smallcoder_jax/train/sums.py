"""Sums of losses over evaluation batches, as a CLU metric, and the measures computed from them."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import clu.metrics
import jax
from flax import struct

from smallcoder_jax.base.distributed import StopVote
from smallcoder_jax.base.errors import UserError


@struct.dataclass
class EvalMetrics(clu.metrics.Metric):
    """Sums of a loss over batches, by name. Merging two gives exactly the sums over both.

    The sums are Python floats on the host, so merging does not use the device and adds in double precision.
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
        """The sums themselves. The stage computes measures from them (`Task.summarise`)."""
        return dict(self.sums)


def add_up(
    batches: Iterable[Mapping[str, Any]], vote: StopVote | None = None, wanted: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Adds up the sums of a loss over batches.

    The sums of each batch are read after the next one was dispatched, so that the device does not wait for the host.
    With a `vote`, returns None if a stop is `wanted` before the end. Raises UserError when there is no batch.
    """
    total, pending = EvalMetrics.empty(), None

    def with_sums(sums: Mapping[str, Any]) -> EvalMetrics:
        values = jax.device_get(dict(sums))
        if vote is not None:
            vote.count(values)
        return total.merge(EvalMetrics.from_model_output(**values))

    for sums in batches:
        sums = {**sums, **(vote.cast(wanted()) if vote is not None else {})}
        if pending is not None:
            total = with_sums(pending)
        if vote is not None and vote.passed:
            return None
        pending = sums
    if pending is None:
        raise UserError("there is nothing to evaluate on: the validation split is empty")
    return with_sums(pending).compute()


def language_summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Loss (nats per token), perplexity, bits_per_byte, accuracy and top5_accuracy of a language model.

    They are computed from the sums of `losses.language_model`, with `weight` and, if known, UTF-8 `bytes`. Measures
    whose denominator is 0 are NaN.
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
    """The quotient; NaN when `count` is 0."""
    return total / count if count else math.nan
