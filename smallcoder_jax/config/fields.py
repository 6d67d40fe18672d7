"""The parts of a section of the schema: fields with their ranges, and a check of the constraints between fields."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

LARGEST_INT = 2**31 - 1  # devices count in 32 bits
LARGEST_SEED = 2**32 - 1
RANGE = "range"  # the key of a Range in a field's metadata


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed values of a number of the config: `low` and `high` are inclusive bounds, `above` and `below`
    exclusive.

    A float is checked as the float32 that it becomes on a device, so that it is finite there.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    zero: str = ""  # the meaning of 0 where it is not a quantity

    def problem(self, value: float) -> str:
        """What is wrong with `value`, such as 'must be at least 1'; "" where it is valid."""
        if isinstance(value, float):
            value = _float32(value)
            if not math.isfinite(value):
                return "must be a finite number"
        wrong = ""
        if value < self.low:
            wrong = f"must be at least {self.low}"
        elif value > self.high:
            wrong = f"must be at most {self.high}"
        elif value <= self.above:
            wrong = f"must be above {self.above}"
        elif value >= self.below:
            wrong = f"must be below {self.below}"
        return f"{wrong}; 0 means {self.zero}" if wrong and self.zero else wrong


def number(
    default: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    zero: str = "",
) -> Any:
    """A section's field that holds a number, with its Range. Integers are at most LARGEST_INT unless `high` is
    given."""
    if isinstance(default, int) and math.isinf(high):
        high = LARGEST_INT
    return dataclasses.field(default=default, metadata={RANGE: Range(low, high, above, below, zero)})


class Section:
    """A part of the config that checks the constraints between its values."""

    def problems(self) -> Iterator[str]:
        """One sentence for each contradiction between values. Called after every number has passed its range check."""
        return iter(())


def out_of_range(section: Any, prefix: str = "") -> Iterator[str]:
    """One sentence for each number of a section, or of the sections inside it, that is out of its range."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{prefix}{field.name}.")
        elif RANGE in field.metadata and (problem := field.metadata[RANGE].problem(value)):
            yield f"{prefix}{field.name}={shown(value)} {problem}"


def shown(value: Any) -> str:
    """Any value as text for a message: its repr, truncated where it is long."""
    try:
        text = repr(value)
    except Exception:  # raised by a class of the user's, or for an integer of thousands of digits
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
