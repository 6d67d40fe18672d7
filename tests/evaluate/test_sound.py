"""What is not a number is no measure."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import CheckFailed
from smallcoder_jax.evaluate.sound import check_measures, check_parameters


def test_measures_are_finite() -> None:
    found = {"loss": 1.5, "tokens": 10, "references": {"xz -9e": 2.0}, "data": {"sources": "stdlib"}, "start": None}
    assert check_measures("runs/a", found) is found
    for spoilt in ({"loss": np.nan}, {"perplexity": np.inf}, {"references": {"xz -9e": -np.inf}}):
        with pytest.raises(CheckFailed, match=r"model in runs/a: (loss|perplexity|xz -9e) is (nan|inf|-inf); expected"):
            check_measures("runs/a", found | spoilt)


def test_parameters_are_finite() -> None:
    params = {
        "layers": [{"kernel": jnp.ones(3)}, {"kernel": jnp.ones(2, jnp.bfloat16)}],
        "codes": jnp.ones(2, jnp.int8),
    }
    check_parameters("runs/a", {**params, "head": None})
    params["layers"][1]["kernel"] = jnp.array([1, np.nan], jnp.bfloat16)
    with pytest.raises(CheckFailed, match=r"model in runs/a is not finite: NaN or infinity in layers.1.kernel; there"):
        check_parameters("runs/a", params)
