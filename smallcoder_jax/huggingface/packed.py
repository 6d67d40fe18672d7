"""Ternary kernels packed four to a byte.

A packed kernel is two tensors. `NAME` is uint8 [out, in / 4] and holds sign + 1 in two bits, the first input of four in
the lowest ones. `NAME_sum` is one float32: the sum of the absolute values of the trained kernel. Their mean is what the
signs are multiplied by (`ops.ternary`).

A kernel that is unpacked has the same signs and the same mean, to the last bit, but not the trained values: all -1 and
1 are equally far from 0, but for the last bits. It computes the same function and can be trained further. What is lost
is how close each weight was to changing its sign.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.ops.ternary import quantized_kernel

SUM = "_sum"  # follows the name of the packed tensor
_QUANTIZE = jax.jit(quantized_kernel)
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def pack(name: str, kernel_IO: Any) -> dict[str, np.ndarray]:
    """The two tensors of a kernel [in, out]. Raises UserError where they would not give the same signs and scale."""
    signs_IO, unit = _quantized(kernel_IO)
    codes_OI = np.ascontiguousarray(signs_IO.T + 1).astype(np.uint8)
    spare = -codes_OI.shape[1] % 4
    codes_OI = np.pad(codes_OI, [(0, 0), (0, spare)], constant_values=1)
    bytes_OI: np.ndarray = np.bitwise_or.reduce(codes_OI.reshape(len(codes_OI), -1, 4) << _SHIFTS, axis=-1)
    for total in _around(np.float32(unit * np.float32(signs_IO.size))):
        with contextlib.suppress(UserError):  # a kernel with too many weights
            again_IO, unit_again = _quantized(unpack(name, bytes_OI, float(total), kernel_IO.shape))
            if unit_again == unit and np.array_equal(again_IO, signs_IO):
                return {name: bytes_OI, name + SUM: np.array(total, np.float32)}
    raise UserError(
        f"{name} cannot be packed without a change: {signs_IO.size:,} weights, of which {np.count_nonzero(signs_IO):,} "
        f"are not 0, with a mean of {unit:.3g}; export it with --weights=float"
    )


def unpack(name: str, bytes_OI: np.ndarray, total: float, shape: tuple[int, int]) -> np.ndarray:
    """The kernel [in, out] of float32. Raises UserError that names the tensor for a code that is not one of -1, 0, 1,
    and for a `total` that no such kernel has.

    The absolute values are whole multiples of a power of two and add up to `total`. All partial sums are then whole
    numbers below 2^24 of this power, and exact in float32 in whatever order a device adds them. With one value for all,
    the sum would be rounded differently from device to device, and the mean with it.
    """
    inputs, outputs = shape
    codes_OI = (bytes_OI[..., None] >> _SHIFTS & 3).reshape(outputs, -1)
    if bool((codes_OI == 3).any()) or bool((codes_OI[:, inputs:] != 1).any()):
        raise UserError(f"tensor {name} holds a code that stands for none of -1, 0 and 1: it is damaged")
    signs_OI = codes_OI[:, :inputs].astype(np.float32) - 1.0
    if not (np.isfinite(total) and total >= 0.0):
        raise UserError(f"tensor {name}{SUM} is {total}; expected the sum of absolute values")
    filled = np.flatnonzero(signs_OI)
    if not len(filled):
        return np.zeros(shape, np.float32)
    granule = 2.0 ** (math.frexp(total)[1] - 24)  # total is a whole number of them below 2^24
    each, rest = divmod(round(total / granule), len(filled))
    if each == 0:
        raise UserError(f"tensor {name}{SUM} is {total}, too little for {len(filled):,} weights in {name}")
    signs_OI.reshape(-1)[filled] *= granule * (each + (np.arange(len(filled)) < rest)).astype(np.float32)
    return np.ascontiguousarray(signs_OI.T)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a packed kernel [in, out]."""
    return shape[1], -(-shape[0] // 4)


def _quantized(kernel_IO: Any) -> tuple[np.ndarray, np.float32]:
    cpu = jax.local_devices(backend="cpu")[0]
    signs_IO, unit = _QUANTIZE(jax.device_put(np.asarray(kernel_IO, np.float32), cpu))
    return np.asarray(signs_IO), np.float32(unit)


def _around(guess: np.float32) -> Iterator[np.float32]:
    """The float32 numbers around `guess`, nearest first. Which of them is the sum depends on how the mean is computed:
    XLA multiplies by 1 / N instead of dividing."""
    below = above = guess
    yield guess
    for _ in range(8):
        above, below = np.nextafter(above, np.float32(np.inf)), np.nextafter(below, np.float32(-np.inf))
        yield from (above, below)
