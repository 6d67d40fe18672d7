"""Attention over packed documents, with rotation, causal and document masks and grouped heads in one function.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.kernels import flash_hopper, flash_tpu
from smallcoder_jax.kernels.tile_table import lookup
from smallcoder_jax.kernels.tiles import HopperTiles, TpuTiles
from smallcoder_jax.mesh import BATCH, HEADS, context_size, traced_device
from smallcoder_jax.ops.attention_xla import Keys, Queries, attend_xla
from smallcoder_jax.ops.rope import angles, rotate

IMPLEMENTATIONS = ("xla", "cudnn", "pallas_tpu", "pallas_gpu")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}  # xla runs on any
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


class Choice(NamedTuple):
    implementation: str
    reason: str
    tiles: TpuTiles | HopperTiles | None = None  # tile sizes of a Pallas kernel


def choose(
    implementation: str, length: int, keys: int, group: int, size: int, dtype: DTypeLike,
    platform: str | None = None, device: str | None = None, *, packed: bool = True, context: int = 1,
) -> Choice:  # fmt: skip
    """Resolves `auto` for rows of `length` queries and `keys` keys, with `group` query heads of size `size` per key
    head.

    `platform` and `device` (its kind) describe the devices. Without a platform, `auto` takes the platform of the mesh
    that is being traced for, and an explicit implementation is not checked against a platform. `packed`: rows may hold
    several documents. `context`: over how many devices each row is split along its length. Raises UserError for an
    unknown name, and where the implementation asked for cannot serve the shape or the platform.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"attention implementation {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return Choice("xla", "asked for")
    asked = implementation != "auto"
    if asked and platform not in (None, PLATFORMS[implementation]):
        place = PLATFORMS[implementation].upper()
        raise UserError(f"attention implementation {implementation!r} runs on {place}s; the platform is '{platform}'")
    if not asked:
        platform = platform or traced_device().platform
        if platform not in KERNELS:
            return Choice("xla", f"the only one for platform '{platform}'")
        implementation = KERNELS[platform]
    tiles, origin = None, "rows of one document"
    if length != keys:
        obstacle = f"it serves packed rows, where each query has its key, not {length} queries over {keys} keys"
    elif context > 1 and implementation != "pallas_tpu":
        obstacle = f"it serves whole rows, which mesh.context={context} splits"
    elif implementation == "cudnn":
        obstacle = _cudnn_obstacle(size, dtype, packed)
    elif implementation == "pallas_gpu":
        tiles, _, origin = lookup(HopperTiles, device, size, group, length)
        obstacle = flash_hopper.obstacle(length, group, size, dtype, tiles, device)
    else:
        tiles, _, origin = lookup(TpuTiles, device, size, group, length)
        obstacle = flash_tpu.obstacle(length, group, size, dtype, tiles, device)
    if obstacle is None:
        why = "asked for" if asked else f"platform '{platform}', packed rows"
        return Choice(implementation, f"{why}; {origin}", tiles)
    if asked:
        raise UserError(f"attention implementation {implementation!r}: {obstacle}; use auto or xla")
    return Choice("xla", f"{implementation}: {obstacle}")


def _cudnn_obstacle(size: int, dtype: DTypeLike, packed: bool) -> str | None:
    if packed:
        return "it cannot be told where the documents of a row end, and rows are packed"
    if jnp.dtype(dtype).itemsize != 2:
        return f"it multiplies numbers of 16 bits, not {jnp.dtype(dtype).name}"
    return f"it serves head sizes up to 128 that 8 divides, not {size}" if size > 128 or size % 8 else None


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_positions_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"],
    q_segment_ids_BT: Int[Array, "B T"],
    kv_segment_ids_BS: Int[Array, "B S"],
    rope_theta: float | None,
    window: int | None = None,
    implementation: str = "auto",
    packed: bool = True,
) -> Float[Array, "B T N H"]:
    """softmax(rot(q) rot(k)^T / sqrt(H)) v, where a query sees the keys of its own document at or before its position.

    `window`: a query sees only the last `window` of these positions, its own included. `rope_theta=None`: no rotation.
    Segment 0 is padding: it sees nothing, nothing sees it, and its output is 0. S == T means that key i belongs to
    query i, as in a packed row, where positions rise within a document. `packed=False` promises that each row holds one
    document, with padding only at the end. Softmax is computed in float32; the result has the dtype of `q_BTNH`.
    """
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    group, device = q_BTNH.shape[2] // k_BSKH.shape[2], traced_device().device_kind
    chosen = choose(
        implementation, length, keys, group, q_BTNH.shape[3], q_BTNH.dtype, device=device, packed=packed,
        context=context_size(),
    )  # fmt: skip
    if chosen.tiles is not None:
        return _flash(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, q_segment_ids_BT, rope_theta, window, chosen.tiles)
    if rope_theta is not None:
        q_BTNH = rotate(q_BTNH, q_positions_BT, rope_theta)
        k_BSKH = rotate(k_BSKH, kv_positions_BS, rope_theta)
    if chosen.implementation == "cudnn":
        attend = functools.partial(_cudnn, window=window)
        return _on_each_device(attend, q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, None)
    queries = Queries(q_BTNH, q_positions_BT, q_segment_ids_BT)
    kv = Keys(k_BSKH, v_BSKH, kv_positions_BS, kv_segment_ids_BS)
    return attend_xla(queries, kv, window) if context_size() == 1 else _with_gathered_keys(queries, kv, window)


def _flash(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, segment_ids_BT: Array, theta: float | None,
    window: int | None, tiles: TpuTiles | HopperTiles,
) -> Array:  # fmt: skip
    """Runs the Pallas kernel that `tiles` belong to."""
    rotation = None if theta is None else angles(positions_BT, q_BTNH.shape[-1], theta)
    if isinstance(tiles, TpuTiles):
        attend = functools.partial(flash_tpu.flash_attention, window=window, tiles=tiles)
    else:
        attend = functools.partial(flash_hopper.flash_attention, window=window, tiles=tiles)
    return _on_each_device(attend, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, rotation)


def _cudnn(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_ids_BT: Array, _: None, *, window: int | None
) -> Array:  # fmt: skip
    """Attention by cuDNN. As each row holds one document, the causal mask alone hides the padding at its end."""
    local = None if window is None else (window - 1, 0)
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return jnp.where(segment_ids_BT[:, :, None, None] > 0, o_BTNH, jnp.zeros((), o_BTNH.dtype))


def _on_each_device(
    attend: Callable[..., Array], q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_ids_BT: Array,
    rotation: tuple[Array, Array] | None,
) -> Array:  # fmt: skip
    """Runs `attend` on a mesh, each device on its own rows and heads. Where rows are split along their length, each
    device attends from its own queries to all keys of their rows.
    """
    operands = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, rotation)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return attend(*operands)

    def attend_own(q_BTNH: Array, *rest: Any) -> Array:
        first = jax.lax.axis_index("context") * q_BTNH.shape[1]
        return attend(q_BTNH, *jax.tree.map(_gather_rows, rest), first_query=first)

    in_specs = (HEADS, HEADS, HEADS, BATCH, None if rotation is None else (BATCH, BATCH))
    function = attend if context_size() == 1 else attend_own
    return jax.shard_map(function, in_specs=in_specs, out_specs=HEADS, check_vma=False)(*operands)


def _gather_rows(x_BT: Array) -> Array:
    """Gathers whole rows [B, S, ...] from the parts that the devices hold. The gradient is summed and split again."""
    return jax.lax.all_gather(x_BT, "context", axis=1, tiled=True)


def _with_gathered_keys(queries: Queries, kv: Keys, window: int | None) -> Array:
    """The XLA reference where rows are split along their length: each device attends from its own queries to all keys
    of its rows. The backward pass gives every device the summed gradients of its own keys.
    """

    def attend(q_BTNH: Array, positions_BT: Array, segment_ids_BT: Array, *kv: Array) -> Array:
        return attend_xla(Queries(q_BTNH, positions_BT, segment_ids_BT), Keys(*map(_gather_rows, kv)), window)

    in_specs = (HEADS, BATCH, BATCH, HEADS, HEADS, BATCH, BATCH)
    return jax.shard_map(attend, in_specs=in_specs, out_specs=HEADS, check_vma=False)(*queries, *kv)
