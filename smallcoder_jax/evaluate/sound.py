"""Checks that a model and its measures are finite: NaN compares as neither worse nor better, and is not valid JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from smallcoder_jax.base.errors import CheckFailed


def check_parameters(path: str, params: Any) -> None:
    """Raises CheckFailed when a parameter of the model in `path` is NaN or infinite.

    Measures alone do not show it: some are counts, such as the number of right calls, which are always finite.
    """
    bad = [
        jax.tree_util.keystr(place, simple=True, separator=".")
        for place, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not bool(jnp.isfinite(leaf).all())
    ]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckFailed(
            f"the model in {path} is not finite: NaN or infinity in {bad[0]}{more}; there is nothing to evaluate. Give "
            "an earlier step (--step), and look into the run's metrics for where it went wrong"
        )


def check_measures(path: str, measures: dict[str, Any]) -> dict[str, Any]:
    """Returns `measures`, which may be nested. Raises CheckFailed when one of them is NaN or infinite."""
    bad = [f"{name} is {value}" for name, value in _numbers(measures) if not math.isfinite(value)]
    if bad:
        raise CheckFailed(
            f"measures of the model in {path}: {', '.join(bad)}; expected finite numbers. The model overflows: give an "
            "earlier step (--step), and look into the run's metrics for where it went wrong"
        )
    return measures


def _numbers(measures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in measures.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield name, value
