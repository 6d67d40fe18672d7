"""Tile sizes of the attention kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Queries and keys that one step of the TPU kernel works on. Multiples of 128, the lanes of a register, and one
    divides the other, so that a row is cut into both. The defaults are what runs where nothing was tuned.
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
    """Blocks of the Hopper kernels and how many of them a pipeline holds in shared memory: keys (and values) in the
    forward pass and where queries' gradients are made, queries (and theirs) where keys' gradients are made.
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
        """Rows are padded to a multiple of this: 128 are what the warpgroups of a block can take at once."""
        return max(128, self.block_kv, self.dq_block_kv, self.dkv_block_q)
