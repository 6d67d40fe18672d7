"""Which key blocks are visited: against pairs of tokens counted by hand from the segment ids."""

import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.kernels.ranges import NOTHING, document_starts, document_stops, key_ranges, query_ranges
from tests.kernels.cases import KINDS, row

LENGTH = 768


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    positions, segments = zip(*(row(kind, LENGTH, generator) for kind in KINDS), strict=True)
    return np.stack(positions), np.stack(segments)


def test_starts_of_documents() -> None:
    starts = document_starts(jnp.asarray([[1, 1, 2, 3, 3, 3, 0, 0], [5, 5, 5, 5, 4, 4, 4, 4]], jnp.int32))
    assert starts.tolist() == [[0, 0, 2, 3, 3, 3, NOTHING, NOTHING], [0, 0, 0, 0, 4, 4, 4, 4]]


@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (256, 128), (128, 384)])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_ranges_equal_a_count_by_hand(block_q: int, block_kv: int, window: int | None) -> None:
    positions, segments = rows(seed=block_q + block_kv)
    got = key_ranges(document_starts(jnp.asarray(segments)), block_q, block_kv, window)
    for b in range(len(KINDS)):
        same = (segments[b][:, None] == segments[b][None, :]) & (segments[b][:, None] > 0)
        distance = positions[b][:, None] - positions[b][None, :]
        seen = same & (distance >= 0) & (distance < (window or LENGTH))
        blocks = seen.reshape(LENGTH // block_q, block_q, LENGTH // block_kv, block_kv)
        needed, whole = blocks.any((1, 3)), blocks.all((1, 3))
        for i in range(LENGTH // block_q):
            first, whole_first, whole_stop, stop = (int(x[b, i]) for x in got)
            assert list(range(first, stop)) == np.flatnonzero(needed[i]).tolist(), (KINDS[b], i)
            assert list(range(whole_first, whole_stop)) == np.flatnonzero(whole[i]).tolist(), (KINDS[b], i)
            assert first <= whole_first <= whole_stop <= stop


@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (64, 128), (128, 384)])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_ranges_of_queries_equal_a_count_by_hand(block_q: int, block_kv: int, window: int | None) -> None:
    positions, segments = rows(seed=block_q + block_kv)
    got = query_ranges(document_stops(jnp.asarray(segments)), block_kv, block_q, window)
    for b in range(len(KINDS)):
        same = (segments[b][:, None] == segments[b][None, :]) & (segments[b][:, None] > 0)
        distance = positions[b][:, None] - positions[b][None, :]
        seen = same & (distance >= 0) & (distance < (window or LENGTH))
        blocks = seen.reshape(LENGTH // block_q, block_q, LENGTH // block_kv, block_kv)
        needed, whole = blocks.any((1, 3)), blocks.all((1, 3))
        for j in range(LENGTH // block_kv):
            first, whole_first, whole_stop, stop = (int(x[b, j]) for x in got)
            assert list(range(first, stop)) == np.flatnonzero(needed[:, j]).tolist(), (KINDS[b], j)
            assert list(range(whole_first, whole_stop)) == np.flatnonzero(whole[:, j]).tolist(), (KINDS[b], j)
            assert first <= whole_first <= whole_stop <= stop
