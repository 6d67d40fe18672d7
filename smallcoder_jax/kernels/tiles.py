"""Tile sizes of the attention kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Queries and keys that one step of the TPU kernel works on. Multiples of 128, the lanes of a register, and one
    divides the other, so that a row is cut into both.
    """

    block_q: int
    block_kv: int

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
