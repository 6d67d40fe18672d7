"""What the attention kernel is compared with on a TPU: XLA's RoPE and jax's splash attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from smallcoder_jax.ops.rope import rotate


def attend(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, segment_ids_BT: Array, theta: float, *_: Any
) -> Array:
    """On one device, in the place of `ops.attention._flash`. Blocks of 1024 and one backward kernel for all three
    gradients; documents are masked by segment ids, heads share keys (one call per key head).
    """
    batch, length, heads, size = q_BTNH.shape
    group = heads // k_BTKH.shape[2]
    blocks = splash_attention_kernel.BlockSizes(
        block_q=1024, block_kv=1024, block_kv_compute=512, block_q_dkv=1024, block_kv_dkv=1024,
        block_kv_dkv_compute=512, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * group)
    one_key_head: Any = splash_attention_kernel.make_splash_mqa(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)

    def one_row(q_KGTH: Array, k_KTH: Array, v_KTH: Array, segment_ids_T: Array) -> Array:
        ids = splash_attention_kernel.SegmentIds(segment_ids_T, segment_ids_T)
        return jax.vmap(lambda *qkv: one_key_head(*qkv, segment_ids=ids))(q_KGTH, k_KTH, v_KTH)

    scaled_BTNH = rotate(q_BTNH, positions_BT, theta) * jnp.asarray(size**-0.5, q_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTH = (
        x.transpose(0, 2, 1, 3) for x in (scaled_BTNH, rotate(k_BTKH, positions_BT, theta), v_BTKH)
    )
    o_BKGTH = jax.vmap(one_row)(q_BNTH.reshape(batch, -1, group, length, size), k_BKTH, v_BKTH, segment_ids_BT)
    return o_BKGTH.reshape(q_BNTH.shape).transpose(0, 2, 1, 3)
