"""Low-rank adapters (LoRA, arXiv 2106.09685): a kernel W stays fixed, and a low-rank product added to it is trained.

    W + alpha / rank * a @ b        a [in, rank], b [rank, out]

Adapters are the part `lora` of the parameters, at the paths of their kernels. The part `lora_scale` is alpha / rank.
`build.model_params` merges them into ordinary parameters, so no other code has to know about adapters.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import LoraConfig

Params = dict[Any, Any]


def init_adapters(lora: LoraConfig, params: Params, key: Array) -> Params:
    """Fresh float32 adapters for unrolled `params` (arrays or shapes). Traceable.

    `a` is initialised at random with variance 1 / in and `b` with 0, so that the merged model initially equals the one
    without adapters. Raises UserError when `lora.pattern` is no regular expression, or matches no kernel of a block.
    """

    def of_block(kernels: dict[str, Any], key: Array) -> Params:
        adapters = {}
        for number, (path, kernel) in enumerate(kernels.items()):
            fan_in, fan_out = kernel.shape
            a = jax.random.normal(jax.random.fold_in(key, number), (fan_in, lora.rank), jnp.float32)
            adapters |= {f"{path}/a": a * fan_in**-0.5, f"{path}/b": jnp.zeros((lora.rank, fan_out), jnp.float32)}
        return unflatten_dict(adapters, sep="/")

    def within(params: Params, key: Array) -> Params:
        """Adapters for the blocks of `params`, and for those of the parts that it has."""
        found = {}
        for number, (name, below) in enumerate(sorted(params.items())):
            if name == "blocks":
                keys = {i: jax.random.fold_in(key, i) for i in below}
                found[name] = {i: of_block(_kernels(lora, block), keys[i]) for i, block in below.items()}
            elif isinstance(below, dict) and (adapters := within(below, jax.random.fold_in(key, 1_000_000 + number))):
                found[name] = adapters
        return found

    return within(params, key)


def beside(lora: LoraConfig, params: Params) -> Params:
    """The parts that are not trained when adapters are: the parameters of the model, and the scale."""
    return {"model": params, "lora_scale": np.float32(lora.alpha / lora.rank)}


@jax.jit
def merge(params: Params, adapters: Params, scale: Array) -> Params:
    """`params` with the products of the adapters added to their kernels, in float32.

    Both have the same layout: scanned kernels have a leading axis, and so have their adapters.
    """

    def add(below: Any, adapters: Params) -> Any:
        if isinstance(below, dict):
            return {name: add(own, adapters[name]) if name in adapters else own for name, own in below.items()}
        # In full precision, so that kernels merged for an export equal the trained ones on every device.
        return below + scale * jnp.matmul(adapters["a"], adapters["b"], precision=jax.lax.Precision.HIGHEST)

    return add(params, adapters)


def _kernels(lora: LoraConfig, block: Params) -> dict[str, Any]:
    """The kernels that get adapters, by their path in the block."""
    try:
        pattern = re.compile(lora.pattern)
    except re.error as error:
        raise UserError(f"{lora.pattern=} is no regular expression: {error}") from error
    there = {path: leaf for path, leaf in flatten_dict(block, sep="/").items() if path.endswith("/kernel")}
    found = {path: leaf for path, leaf in sorted(there.items()) if pattern.fullmatch(path)}
    if not found:
        raise UserError(f"{lora.pattern=} matches no kernel of a block; there are {', '.join(sorted(there))}")
    return found
