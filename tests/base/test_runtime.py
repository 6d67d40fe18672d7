"""What the commands share of the runtime: freed memory goes back to the system."""

import ctypes
import os
from pathlib import Path

import pytest

from smallcoder_jax.base.runtime import give_back_memory

BLOCK, COUNT = 64 << 10, 2000  # below malloc's threshold for a mapping of its own, 125 MiB in all


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps what was freed")
def test_freed_memory_goes_back():
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    blocks = [c.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    held = c.malloc(BLOCK)  # at the end of the heap, so that malloc cannot shrink it by itself
    for block in blocks:
        c.free(block)
    kept = resident()
    give_back_memory()
    assert kept - resident() > BLOCK * COUNT // 2
    c.free(held)
