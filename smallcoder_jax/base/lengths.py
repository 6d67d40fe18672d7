"""Rounds row lengths up so that few different lengths are compiled: one rule for each kind of row."""

from __future__ import annotations


def power_of_two(number: int) -> int:
    """The next power of two. Used for the number of rows that are decoded together."""
    return 1 << max(number - 1, 0).bit_length()


def bucket(number: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96... Used for prompts, caches and answers, whose length has no fixed maximum.
    Above 16, less than a third of the result is padding.
    """
    power = power_of_two(number)
    return max(16, power * 3 // 4 if number <= power * 3 // 4 else power)


def quarter(longest: int, most: int) -> int:
    """The smallest of a quarter, half, three quarters and all of `most` that is at least `longest`. Used for rows that
    hold parts of training rows of `most` tokens. A multiple of 128 where `most` is one, as attention kernels require.
    """
    step = -(-most // 4)
    if most % 128 == 0:
        step += -step % 128
    return min(-(-longest // step) * step, most)
