"""Low-rank adapters (LoRA, arXiv 2106.09685): instead of a kernel W, a product that is added to it is trained.

    W + alpha / rank * a @ b        a [in, rank], b [rank, out]

Adapters are the part `lora`, at the paths of their kernels; the part `lora_scale` is alpha / rank. What uses a model
gets ordinary parameters, merged (`build.model_params`): nothing else knows of adapters.
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
    """Fresh adapters, float32, for unrolled `params` (arrays or shapes); traceable. `a` is drawn with variance 1 / in,
    `b` is 0: the merged model is the one without adapters.

    Raises UserError where `lora.pattern` is no regular expression, or no kernel of a block matches it.
    """

    def of_block(kernels: dict[str, Any], key: Array) -> Params:
        adapters = {}
        for number, (path, kernel) in enumerate(kernels.items()):
            fan_in, fan_out = kernel.shape
            drawn = jax.random.normal(jax.random.fold_in(key, number), (fan_in, lora.rank), jnp.float32)
            adapters |= {f"{path}/a": drawn * fan_in**-0.5, f"{path}/b": jnp.zeros((lora.rank, fan_out), jnp.float32)}
        return unflatten_dict(adapters, sep="/")

    blocks = params["blocks"]
    return {"blocks": {i: of_block(_kernels(lora, block), jax.random.fold_in(key, i)) for i, block in blocks.items()}}


def beside(lora: LoraConfig, params: Params) -> Params:
    """The parts that stay as they are while adapters are trained: a model's parameters, and the scale."""
    return {"model": params, "lora_scale": np.float32(lora.alpha / lora.rank)}


@jax.jit
def merge(params: Params, adapters: Params, scale: Array) -> Params:
    """`params` with what adapters of the same layout add to the kernels, in float32. Scanned kernels have a leading
    axis, and so have their adapters.
    """

    def add(below: Any, adapters: Params) -> Any:
        if isinstance(below, dict):
            return {name: add(own, adapters[name]) if name in adapters else own for name, own in below.items()}
        # In full precision: kernels that are merged for an export, on whatever device, are those that were trained.
        return below + scale * jnp.matmul(adapters["a"], adapters["b"], precision=jax.lax.Precision.HIGHEST)

    return add(params, adapters)


def _kernels(lora: LoraConfig, block: Params) -> dict[str, Any]:
    """By their path in the block, the kernels that get adapters."""
    try:
        pattern = re.compile(lora.pattern)
    except re.error as error:
        raise UserError(f"{lora.pattern=} is no regular expression: {error}") from error
    there = {path: leaf for path, leaf in flatten_dict(block, sep="/").items() if path.endswith("/kernel")}
    found = {path: leaf for path, leaf in sorted(there.items()) if pattern.fullmatch(path)}
    if not found:
        raise UserError(f"{lora.pattern=} matches no kernel of a block; there are {', '.join(sorted(there))}")
    return found
