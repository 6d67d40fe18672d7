"""The blocks of a byte-level model that SmallCoder JAX exported: see `modeling_smallcoder_hnet`.

Intermediate results that the JAX model computes in float32 are computed in float32 or, in a model of float64, in
float64. Constants are the float32 numbers that they are there.

Shapes: B rows, T positions, D width of a stage, E width of a recurrence, S keys, N query heads, K key-value heads, H
head size, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_smallcoder_hnet import SmallcoderHnetConfig

EPS = float(np.float32(1e-6))  # of every norm
LARGEST = 127.0  # of an activation in 8 bits
SMALLEST = float(np.float32(1e-5))  # below which no absolute value is scaled up

State = dict[Any, Any]  # of a part of the model; empty before any text, and changed in place


class Row(NamedTuple):
    """The positions of a stage: which are no padding, which begin a text, and their numbers in their text."""

    real_BT: Tensor
    starts_BT: Tensor
    positions_BT: Tensor


def make_row(real_BT: Tensor, state: State) -> Row:
    """The row that follows the positions that `state` has counted."""
    counted_BT = torch.cumsum(real_BT.long(), dim=1)
    if "count" in state:
        counted_BT = counted_BT + state["count"][:, None]
    state["count"] = counted_BT[:, -1]
    return Row(real_BT, real_BT & (counted_BT == 1), (counted_BT - 1).clamp(min=0))


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or, where it is float64, in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def latest(x_BT: Tensor, real_BT: Tensor, count: int) -> Tensor:
    """The last `count` real positions of each row, the last one at the end; zeros where there are fewer."""
    from_end_BT = torch.cumsum(real_BT.flip(1).long(), dim=1).flip(1)  # 1 at the last real position
    rows, columns = (real_BT & (from_end_BT <= count)).nonzero(as_tuple=True)
    kept = x_BT.new_zeros((x_BT.shape[0], count, *x_BT.shape[2:]))
    kept[rows, count - from_end_BT[rows, columns]] = x_BT[rows, columns]
    return kept


def recurrence(keep_BTE: Tensor, new_BTE: Tensor, start_BE: Tensor | None) -> Tensor:
    """h_t = keep_t h_{t-1} + new_t with h_{-1} = `start_BE`: all h_t, by a scan of doubling strides."""
    if start_BE is not None:
        new_BTE = torch.cat([new_BTE[:, :1] + keep_BTE[:, :1] * start_BE[:, None], new_BTE[:, 1:]], dim=1)
    stride = 1
    while stride < new_BTE.shape[1]:
        later_BTE = new_BTE[:, stride:] + keep_BTE[:, stride:] * new_BTE[:, :-stride]
        new_BTE = torch.cat([new_BTE[:, :stride], later_BTE], dim=1)
        keep_BTE = torch.cat([keep_BTE[:, :stride], keep_BTE[:, stride:] * keep_BTE[:, :-stride]], dim=1)
        stride *= 2
    return new_BTE


def rms_norm(x_BTD: Tensor, scale_D: Tensor) -> Tensor:
    x_wide = wide(x_BTD)
    inverse_BT1 = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + EPS)
    return (x_wide * inverse_BT1 * scale_D).to(x_BTD.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight)


class BitLinear(nn.Module):
    """A ternary layer, which norms its input itself and rounds it to 8 bits.

    The weights are stored as trained, or packed: `weight` [O, I / 4] holds sign + 1 in two bits, the first input in the
    lowest, and `weight_sum` is the sum of their absolute values.
    """

    def __init__(self, inputs: int, outputs: int, *, packed: bool):
        super().__init__()
        self.inputs, self.name = inputs, ""
        self.gain = nn.Parameter(torch.ones(inputs))
        if packed:
            self.register_buffer("weight", torch.zeros((outputs, -(-inputs // 4)), dtype=torch.uint8))
            self.register_buffer("weight_sum", torch.zeros(()))
        else:
            self.weight = nn.Parameter(torch.zeros((outputs, inputs)))
        self._quantized: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        x_wide = wide(rms_norm(x_BTI, self.gain))
        scale_BT1 = LARGEST / x_wide.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)
        whole_BTI = (x_wide * scale_BT1).round().clamp(-128.0, LARGEST)
        signs_OI, unit = self.quantized(whole_BTI.dtype)
        # Sums of integers: exact in float32, and in TF32 as well, in whatever order they are added.
        sums_BTO = functional.linear(whole_BTI, signs_OI)
        return (sums_BTO * (1.0 / scale_BT1 * unit)).to(x_BTI.dtype)

    def quantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-1, 0 and 1, and what they are to be multiplied by. Kept for as long as the weights are the same."""
        version = 0 if self.weight.is_inference() else self.weight._version
        key = (version, self.weight.data_ptr(), self.weight.device, dtype)
        if self._quantized is None or self._quantized[0] != key:
            with torch.no_grad():
                self._quantized = (key, *self._quantize(dtype))
        return self._quantized[1:]

    def _quantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.weight.dtype == torch.uint8:
            signs_OI = self._unpacked().to(dtype)
            mean = self.get_buffer("weight_sum").to(dtype) / signs_OI.numel()
            return signs_OI, 1.0 / (1.0 / mean.clamp(min=SMALLEST))
        kernel_OI = self.weight.to(dtype)
        scale = 1.0 / kernel_OI.abs().mean().clamp(min=SMALLEST)
        return (kernel_OI * scale).round().clamp(-1.0, 1.0), 1.0 / scale

    def _unpacked(self) -> Tensor:
        codes = torch.stack([self.weight >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)[:, : self.inputs]
        if bool((codes == 3).any()):
            raise ValueError(f"{self.name}.weight holds a code other than those of -1, 0 and 1: the file is damaged")
        return codes.to(torch.int8) - 1


def projection(config: SmallcoderHnetConfig, stage: int, inputs: int, outputs: int) -> nn.Module:
    """A ternary layer, or a dense one without biases."""
    if config.ternary[stage]:
        return BitLinear(inputs, outputs, packed=config.packed)
    return nn.Linear(inputs, outputs, bias=False)


class ShortConv(nn.Module):
    """silu(sum_j taps[j] x_{t-j}), for each channel alone. Its state is the last inputs."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros((size, channels)))

    def forward(self, x_BTE: Tensor, row: Row, state: State) -> Tensor:
        size, length = self.taps.shape[0], x_BTE.shape[1]
        seen_BSE, real_BS = x_BTE, row.real_BT
        if not state:
            state["inputs"] = x_BTE.new_zeros((x_BTE.shape[0], size - 1, x_BTE.shape[2]))
            state["real"] = real_BS.new_zeros((x_BTE.shape[0], size - 1))
        seen_BSE = torch.cat([state["inputs"], seen_BSE], dim=1)
        real_BS = torch.cat([state["real"], real_BS], dim=1)
        known_BSE = torch.where(real_BS[..., None], wide(seen_BSE), 0.0)
        total_BTE = torch.zeros_like(known_BSE[:, :length])
        for back in range(size):
            begin = size - 1 - back
            total_BTE = total_BTE + known_BSE[:, begin : begin + length] * self.taps[back]
        state["inputs"], state["real"] = (latest(x, real_BS, size - 1) for x in (seen_BSE, real_BS))
        return functional.silu(total_BTE).to(x_BTE.dtype)


class Recurrence(nn.Module):
    """The HGRN recurrence (arXiv 2404.07904, 2406.02528): h_t = f_t h_{t-1} + (1 - f_t) silu(value_t), gated."""

    def __init__(self, config: SmallcoderHnetConfig, stage: int):
        super().__init__()
        width = config.widths[stage]
        expanded = width * config.expand_ratio
        self.forget, self.value, self.gate = (projection(config, stage, width, expanded) for _ in range(3))
        self.gate_norm = RMSNorm(expanded)
        self.output = projection(config, stage, expanded, width)
        convolved = {"conv": width} if config.conv == "shared" else {"forget_conv": expanded, "value_conv": expanded}
        for name in ("conv", "forget_conv", "value_conv"):
            wanted = bool(config.conv_size) and name in convolved
            setattr(self, name, ShortConv(convolved[name], config.conv_size) if wanted else None)

    def forward(self, x_BTD: Tensor, row: Row, state: State) -> Tensor:
        def convolved(name: str, x_BTE: Tensor) -> Tensor:
            conv = getattr(self, name)
            return x_BTE if conv is None else conv(x_BTE, row, state.setdefault(name, {}))

        x_BTD = convolved("conv", x_BTD)
        forget_BTE = torch.sigmoid(wide(convolved("forget_conv", self.forget(x_BTD))))
        value_BTE = wide(convolved("value_conv", self.value(x_BTD)))
        new_BTE = functional.silu(value_BTE) * (1.0 - forget_BTE)
        real_BT1, starts_BT1 = row.real_BT[..., None], row.starts_BT[..., None]
        keep_BTE = torch.where(real_BT1, torch.where(starts_BT1, 0.0, forget_BTE), 1.0)
        h_BTE = recurrence(keep_BTE, torch.where(real_BT1, new_BTE, 0.0), state.get("h"))
        state["h"] = h_BTE[:, -1]
        return self.output(self.gate_norm(self.gate(x_BTD)) * functional.silu(h_BTE).to(x_BTD.dtype))


class Attention(nn.Module):
    """Attention in full precision. Its state is the rotated keys, and the values, of the window."""

    def __init__(self, config: SmallcoderHnetConfig):
        super().__init__()
        width = config.widths[-1]
        self.heads, self.kv_heads, self.size = config.heads, config.kv_heads, width // config.heads
        self.window = config.window
        self.query = nn.Linear(width, self.heads * self.size, bias=False)
        self.key = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.value = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.output = nn.Linear(self.heads * self.size, width, bias=False)
        exponent = np.arange(0, self.size, 2, dtype=np.float32) / np.float32(self.size)
        self.frequencies = (np.float32(1.0) / np.power(np.float32(config.rope_theta), exponent)).tolist()

    def forward(self, x_BTD: Tensor, row: Row, state: State) -> Tensor:
        batch, length, _ = x_BTD.shape
        q_BNTH = self._rotated(self.query(x_BTD).view(batch, length, self.heads, self.size), row).transpose(1, 2)
        new = {
            "keys": self._rotated(self.key(x_BTD).view(batch, length, self.kv_heads, self.size), row),
            "values": self.value(x_BTD).view(batch, length, self.kv_heads, self.size),
            "positions": row.positions_BT,
            "real": row.real_BT,
        }
        seen = {name: torch.cat([state[name], x], dim=1) for name, x in new.items()} if state else new
        k_BNSH, v_BNSH = (
            seen[name].transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, dim=1)
            for name in ("keys", "values")
        )
        distance_BTS = row.positions_BT[:, :, None] - seen["positions"][:, None, :]
        visible_BTS = row.real_BT[:, :, None] & seen["real"][:, None, :] & (distance_BTS >= 0)
        if self.window:
            visible_BTS = visible_BTS & (distance_BTS < self.window)
        scores_BNTS = wide(q_BNTH) @ wide(k_BNSH).transpose(-1, -2) * float(np.float32(self.size**-0.5))
        weights_BNTS = scores_BNTS.masked_fill(~visible_BTS[:, None], -1e30).softmax(dim=-1)
        o_BTD = (weights_BNTS.to(v_BNSH.dtype) @ v_BNSH).transpose(1, 2).reshape(batch, length, -1)
        if self.window and seen["real"].shape[1] > self.window:
            seen = {name: latest(x, seen["real"], self.window) for name, x in seen.items()}
        state.update(seen)
        return self.output(torch.where(row.real_BT[..., None], o_BTD, 0.0))

    def _rotated(self, x_BTNH: Tensor, row: Row) -> Tensor:
        """The pair (x[i], x[i + H / 2]) of every head, turned by the angle position * theta^(-2i / H)."""
        first, second = wide(x_BTNH).chunk(2, dim=-1)
        angle_BTh = row.positions_BT[..., None].to(first.dtype) * first.new_tensor(self.frequencies)
        cos, sin = angle_BTh.cos()[:, :, None], angle_BTh.sin()[:, :, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTNH.dtype)


class WindowAttention(nn.Module):
    def __init__(self, config: SmallcoderHnetConfig):
        super().__init__()
        self.attention = Attention(config)

    def forward(self, x_BTD: Tensor, row: Row, state: State) -> Tensor:
        return self.attention(x_BTD, row, state)


class GatedMLP(nn.Module):
    """silu(gate) * up; gate and up are one kernel."""

    def __init__(self, config: SmallcoderHnetConfig, stage: int):
        super().__init__()
        width = config.widths[stage]
        hidden = 256 * -(-(8 * width // 3) // 256)
        self.up = projection(config, stage, width, 2 * hidden)
        self.down = projection(config, stage, hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTI, up_BTI = self.up(x_BTD).chunk(2, dim=-1)
        return self.down(functional.silu(gate_BTI) * up_BTI)


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SmallcoderHnetConfig, stage: int, kind: str):
        super().__init__()
        width = config.widths[stage]
        self.mixer_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.mixer = WindowAttention(config) if kind == "a" else Recurrence(config, stage)
        self.mlp = GatedMLP(config, stage)

    def forward(self, x_BTD: Tensor, row: Row, state: State) -> Tensor:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), row, state)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Stack(nn.Module):
    """Blocks of one width and a final norm."""

    def __init__(self, config: SmallcoderHnetConfig, stage: int, kinds: str):
        super().__init__()
        self.blocks = nn.ModuleList([Block(config, stage, kind) for kind in kinds])
        self.final_norm = RMSNorm(config.widths[stage])

    def forward(self, x_BTD: Tensor, row: Row, state: State) -> Tensor:
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, row, state.setdefault(number, {}))
        return self.final_norm(x_BTD)
