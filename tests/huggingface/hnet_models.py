"""Byte-level models whose exports tests compare, and their parameters."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from smallcoder_jax.config import HnetConfig
from smallcoder_jax.models import build
from tests.helpers import FLOAT32

FLAT = HnetConfig(width=16, blocks=2, context=16)
# Every part that a byte-level model can have: a full-precision stage, a convolution, expansion, attention.
MIXED = HnetConfig(
    width=16,
    inner_widths=(24,),
    encoder_blocks=(1,),
    decoder_blocks=(1,),
    blocks=2,
    context=16,
    ternary=(False, True),
    conv_size=3,
    expand_ratio=2,
    pattern="xa",
    heads=2,
    kv_heads=1,
    window=3,
)


def made(model: HnetConfig, seed: int = 0) -> build.Params:
    """Parameters in which nothing is 0 or 1, and routers that draw borders at about every second position."""

    def moved(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(name.encode()) % 1000)
        scale = 0.0 if "kernel" in name and "residual" not in name else 0.2
        return np.asarray(leaf + scale * jax.random.normal(key, leaf.shape, leaf.dtype))

    return jax.tree_util.tree_map_with_path(moved, build.init_params(model, FLOAT32, jax.random.key(seed)))
