"""The blocks of a byte-level model: a recurrence or attention, and an MLP; with ternary weights or without.

Every part takes the state that it had before the first position and returns the one after the last: in training both
are those of no text, and generation keeps the second one. Positions of segment 0 change no state. The arrays of a state
have the rows of a batch as their first axis.

Shapes: B batch, T positions, S positions that a state remembers, D width of a stage, E width of a recurrence, I width
of an MLP, K key-value heads, H head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.config import ComputeConfig, HnetConfig
from smallcoder_jax.config.hnet import mlp_width
from smallcoder_jax.layers.attention import Attention
from smallcoder_jax.layers.linear import Linear
from smallcoder_jax.layers.norm import RMSNorm
from smallcoder_jax.layers.remat import REMAT_POLICIES
from smallcoder_jax.layers.short_conv import ShortConv
from smallcoder_jax.layers.ternary import BitLinear
from smallcoder_jax.mesh import split_activations
from smallcoder_jax.ops.attention_xla import Keys
from smallcoder_jax.ops.packed import latest
from smallcoder_jax.ops.recurrence import recurrence

EPS = 1e-6  # of every norm
State = Any


class Row(NamedTuple):
    """The positions of a stage: those in their documents, and the segments. `extends` (static) says whether they
    continue what a state holds."""

    positions_BT: Array
    segment_ids_BT: Array
    extends: bool

    @property
    def starts_BT(self) -> Array:
        """Where documents begin."""
        return (self.positions_BT == 0) & (self.segment_ids_BT > 0)


def projection(
    inputs: int, outputs: int, *, ternary: bool, dtype: DTypeLike, rngs: nnx.Rngs, std: float
) -> BitLinear | Linear:
    """A ternary layer, which norms its input itself, or a dense one without biases."""
    if ternary:
        return BitLinear(inputs, outputs, eps=EPS, rngs=rngs, std=std)
    return Linear(inputs, outputs, bias=False, dtype=dtype, rngs=rngs, std=std)


class Recurrence(nnx.Module):
    """The HGRN recurrence (arXiv 2404.07904, 2406.02528): h_t = f_t h_{t-1} + (1 - f_t) silu(value_t), gated."""

    def __init__(self, model: HnetConfig, compute: ComputeConfig, stage: int, *, out_std: float, rngs: nnx.Rngs):
        width, dtype = model.widths[stage], jnp.dtype(compute.dtype)
        self.implementation = compute.recurrence
        expanded = width * model.expand_ratio
        made: dict[str, Any] = {"ternary": model.is_ternary(stage), "dtype": dtype, "rngs": rngs}
        self.forget, self.value, self.gate = (projection(width, expanded, std=width**-0.5, **made) for _ in range(3))
        self.gate_norm = RMSNorm(expanded, EPS)
        self.output = projection(expanded, width, std=out_std * model.expand_ratio**-0.5, **made)
        shared, separate = (model.conv_size > 0 and model.conv == kind for kind in ("shared", "separate"))
        self.conv = ShortConv(width, model.conv_size, rngs=rngs) if shared else None
        self.forget_conv = ShortConv(expanded, model.conv_size, rngs=rngs) if separate else None
        self.value_conv = ShortConv(expanded, model.conv_size, rngs=rngs) if separate else None

    def __call__(self, x_BTD: Array, row: Row, state: State) -> tuple[Array, State]:
        state = dict(state)

        def convolved(name: str, x_BTE: Array) -> Array:
            conv = getattr(self, name)
            if conv is None:
                return x_BTE
            y_BTE, state[name] = conv(x_BTE, row.segment_ids_BT, state[name])
            return y_BTE

        x_BTD = convolved("conv", x_BTD)
        forget_BTE = convolved("forget_conv", self.forget(x_BTD))
        value_BTE = convolved("value_conv", self.value(x_BTD))
        forget_BTE = jax.nn.sigmoid(forget_BTE.astype(jnp.float32))
        new_BTE = jax.nn.silu(value_BTE.astype(jnp.float32)) * (1.0 - forget_BTE)
        real_BT1 = row.segment_ids_BT[..., None] > 0
        keep_BTE = jnp.where(row.starts_BT[..., None], 0.0, forget_BTE)
        keep_BTE, new_BTE = jnp.where(real_BT1, keep_BTE, 1.0), jnp.where(real_BT1, new_BTE, 0.0)
        h_BTE = recurrence(keep_BTE, new_BTE, state["h"], implementation=self.implementation)
        gated_BTE = self.gate_norm(self.gate(x_BTD)) * jax.nn.silu(h_BTE).astype(x_BTD.dtype)
        return self.output(gated_BTE), {**state, "h": h_BTE[:, -1]}


class WindowAttention(nnx.Module):
    """Attention in full precision; its state is the keys and values of the window."""

    def __init__(self, model: HnetConfig, compute: ComputeConfig, *, out_std: float, rngs: nnx.Rngs):
        shape = model.attention()
        self.attention = Attention(
            shape,
            implementation=compute.attention,
            std=shape.width**-0.5,
            out_std=out_std,
            dtype=jnp.dtype(compute.dtype),
            rngs=rngs,
        )

    def __call__(self, x_BTD: Array, row: Row, state: State) -> tuple[Array, State]:
        k_BTKH, v_BTKH = self.attention.project_keys(x_BTD)
        if not row.extends:
            keys = Keys(k_BTKH, v_BTKH, row.positions_BT, row.segment_ids_BT)
            return self.attention(x_BTD, row.positions_BT, row.segment_ids_BT, keys, cached=False), state
        k_BTKH = self.attention.rotated(k_BTKH, row.positions_BT)
        new = {"keys": k_BTKH, "values": v_BTKH, "positions": row.positions_BT, "segment_ids": row.segment_ids_BT}
        both = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), state, new)
        keys = Keys(both["keys"], both["values"], both["positions"], both["segment_ids"])
        attended_BTD = self.attention(x_BTD, row.positions_BT, row.segment_ids_BT, keys, cached=True)
        return attended_BTD, latest(both, both["segment_ids"] > 0, state["positions"].shape[1])


class GatedMLP(nnx.Module):
    """silu(gate) * up; gate and up are one kernel."""

    def __init__(self, width: int, *, ternary: bool, dtype: DTypeLike, out_std: float, rngs: nnx.Rngs):
        hidden = mlp_width(width)
        made: dict[str, Any] = {"ternary": ternary, "dtype": dtype, "rngs": rngs}
        self.up = projection(width, 2 * hidden, std=width**-0.5, **made)
        self.down = projection(hidden, width, std=out_std * (width / hidden) ** 0.5, **made)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTI, up_BTI = jnp.split(self.up(x_BTD), 2, axis=-1)
        return self.down(jax.nn.silu(gate_BTI) * up_BTI)


class Block(nnx.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + mlp(norm(x)). `kind` is a letter of `model.pattern`."""

    def __init__(
        self, model: HnetConfig, compute: ComputeConfig, stage: int, blocks: int, kind: str, *, rngs: nnx.Rngs
    ):
        width, dtype = model.widths[stage], jnp.dtype(compute.dtype)
        out_std = (width * 2 * blocks) ** -0.5  # as in the decoder: the residual stream adds up 2 L outputs
        self.mixer_norm = RMSNorm(width, EPS)
        if kind == "a":
            self.mixer: Any = WindowAttention(model, compute, out_std=out_std, rngs=rngs)
        else:
            self.mixer = Recurrence(model, compute, stage, out_std=out_std, rngs=rngs)
        self.mlp_norm = RMSNorm(width, EPS)
        self.mlp = GatedMLP(width, ternary=model.is_ternary(stage), dtype=dtype, out_std=out_std, rngs=rngs)

    def __call__(self, x_BTD: Array, row: Row, state: State) -> tuple[Array, State]:
        mixed_BTD, state = self.mixer(self.mixer_norm(x_BTD), row, state)
        x_BTD = split_activations(x_BTD + mixed_BTD)
        return split_activations(x_BTD + self.mlp(self.mlp_norm(x_BTD))), state


class Stack(nnx.Module):
    """Blocks of one width and a final norm. Its state is the list of theirs."""

    def __init__(self, model: HnetConfig, compute: ComputeConfig, stage: int, kinds: str, *, rngs: nnx.Rngs):
        self.compute = compute
        # Blocks that are not alike cannot be computed by a scan, and are a list in both layouts.
        self.scanned = compute.layers == "scan" and len(set(kinds)) == 1

        def make(kind: str, rngs: nnx.Rngs) -> Block:
            return Block(model, compute, stage, len(kinds), kind, rngs=rngs)

        if self.scanned:
            of_layer = nnx.vmap(lambda layer_rngs: make(kinds[0], layer_rngs))
            self.blocks: Any = of_layer(rngs.split(len(kinds)))
        else:
            self.blocks = nnx.List([make(kind, rngs) for kind in kinds])
        self.final_norm = RMSNorm(model.widths[stage], EPS)

    def __call__(self, x_BTD: Array, row: Row, states: list[State]) -> tuple[Array, list[State]]:
        def apply(x_BTD: Array, block: tuple[nnx.GraphDef, nnx.State], state: State) -> tuple[Array, State]:
            return nnx.merge(*block)(x_BTD, row, state)

        if self.compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.compute.remat])
        if self.scanned:
            graph, stacked = nnx.split(self.blocks)
            together = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *states)
            x_BTD, together = jax.lax.scan(
                lambda x, layer: apply(x, (graph, layer[0]), layer[1]), x_BTD, (stacked, together)
            )
            after = [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(states))]
            return self.final_norm(x_BTD), after
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x_BTD, state = apply(x_BTD, nnx.split(block), state)
            after.append(state)
        return self.final_norm(x_BTD), after


def empty_states(model: HnetConfig, stage: int, kinds: str, rows: int, positions: int, dtype: DTypeLike) -> list[State]:
    """The states of a stack's blocks before any text. `positions` is the most that may come."""
    width, attention = model.widths[stage], model.attention()
    remembered = min(model.window, positions) if model.window else positions

    def of_recurrence() -> State:
        state: dict[str, Any] = {"h": jnp.zeros((rows, width * model.expand_ratio), jnp.float32)}
        if not model.conv_size:
            return state
        names = ("conv",) if model.conv == "shared" else ("forget_conv", "value_conv")
        convolved = width * (1 if model.conv == "shared" else model.expand_ratio)
        return state | {name: ShortConv.empty(rows, model.conv_size, convolved, dtype) for name in names}

    def of_attention() -> State:
        keys = jnp.zeros((rows, remembered, attention.kv_heads, attention.head_size), dtype)
        places = jnp.zeros((rows, remembered), jnp.int32)
        return {"keys": keys, "values": keys, "positions": places, "segment_ids": places}

    return [of_attention() if kind == "a" else of_recurrence() for kind in kinds]
