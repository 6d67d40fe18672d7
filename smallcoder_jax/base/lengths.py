"""How long a row is made where few lengths may be compiled: one rule for each kind of row."""

from __future__ import annotations


def power_of_two(number: int) -> int:
    """The next power of two: of rows that are decoded together."""
    return 1 << max(number - 1, 0).bit_length()


def bucket(number: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96...: of prompts, caches and answers, which have no longest length. At most half
    of one is padding.
    """
    power = power_of_two(number)
    return max(16, power * 3 // 4 if number <= power * 3 // 4 else power)


def quarter(longest: int, most: int) -> int:
    """The quarter, half, three quarters or whole of a row of `most` that holds `longest` tokens: of rows that are parts
    of training rows. Of 128s where `most` is, as kernels want it.
    """
    step = -(-most // 4)
    if most % 128 == 0:
        step += -step % 128
    return min(-(-longest // step) * step, most)
