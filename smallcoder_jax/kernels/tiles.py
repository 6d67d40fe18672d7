"""Tile sizes of the attention kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """The numbers of queries and keys that one step of the TPU kernel works on. They are multiples of 128, the lanes of
    a register, and one divides the other, so that a row can be split into both. The defaults are used for shapes that
    were not tuned.
    """

    block_q: int = 512
    block_kv: int = 512

    def __post_init__(self) -> None:
        for size in (self.block_q, self.block_kv):
            if size <= 0 or size % 128:
                raise ValueError(f"{self}: block sizes are positive multiples of 128")
        if max(self.block_q, self.block_kv) % min(self.block_q, self.block_kv):
            raise ValueError(f"{self}: one block size divides the other")

    @property
    def row(self) -> int:
        """Rows are padded to a multiple of this."""
        return max(self.block_q, self.block_kv)


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """The sizes of the blocks that the Hopper kernels iterate over, and how many of them a pipeline holds in shared
    memory. These are blocks of keys and values in the forward pass and for the gradients of queries (`dq_`), and blocks
    of queries and output gradients for the gradients of keys and values (`dkv_`).
    """

    block_kv: int = 128
    stages: int = 2
    dq_block_kv: int = 64
    dq_stages: int = 3
    dkv_block_q: int = 64
    dkv_stages: int = 2

    def __post_init__(self) -> None:
        for size in (self.block_kv, self.dq_block_kv, self.dkv_block_q):
            if size not in (64, 128, 256):
                raise ValueError(f"{self}: block sizes are 64, 128 or 256")
        if min(self.stages, self.dq_stages, self.dkv_stages) < 2:
            raise ValueError(f"{self}: a pipeline has two stages or more")

    @property
    def row(self) -> int:
        """Rows are padded to a multiple of this. It is at least 128, the rows that the warpgroups of a block process at
        once."""
        return max(128, self.block_kv, self.dq_block_kv, self.dkv_block_q)
