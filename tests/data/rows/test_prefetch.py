import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smallcoder_jax.data.rows.prefetch import DevicePrefetcher


class Counter:
    """Batches 0, 1, 2, ...; the state is the number of batches drawn."""

    def __init__(self, length, error=None):
        self.drawn, self.length, self.error, self.closed = 0, length, error, False

    def __next__(self):
        if self.drawn == self.length:
            raise self.error or StopIteration
        self.drawn += 1
        return {"tokens": np.full((8, 4), self.drawn - 1, np.int32)}

    def get_state(self):
        return {"drawn": self.drawn}

    def close(self):
        self.closed = True


@pytest.fixture
def sharding():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def test_batches_are_on_the_devices_in_order_with_their_own_states(sharding):
    source = Counter(5)
    prefetcher = DevicePrefetcher(source, sharding, depth=3)
    got = [(int(batch["tokens"][0, 0]), state["drawn"]) for batch, state, _ in prefetcher]
    assert got == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    prefetcher.close()


def test_runs_ahead_by_depth_and_reports_the_state_of_the_used_batch(sharding):
    source = Counter(100)
    prefetcher = DevicePrefetcher(source, sharding, depth=3)
    batch, state, waited = next(prefetcher)
    assert batch["tokens"].sharding == sharding
    assert waited >= 0
    deadline = time.monotonic() + 30
    while source.drawn < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    prefetcher.close()
    assert state == {"drawn": 1}
    assert source.drawn == 4


def test_without_depth_a_batch_is_drawn_when_it_is_asked_for(sharding):
    source = Counter(3)
    prefetcher = DevicePrefetcher(source, sharding, depth=0)
    assert source.drawn == 0
    drawn = []
    for batch, state, _ in prefetcher:
        drawn.append((int(batch["tokens"][0, 0]), state["drawn"], source.drawn))
    assert drawn == [(0, 1, 1), (1, 2, 2), (2, 3, 3)]
    prefetcher.close()


def test_an_error_ends_what_is_drawn_without_depth_too(sharding):
    prefetcher = DevicePrefetcher(Counter(1, error=OSError("gone")), sharding, depth=0)
    next(prefetcher)
    with pytest.raises(OSError, match="gone"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


def test_transfers_are_explicit(sharding):
    with jax.transfer_guard("disallow"):
        prefetcher = DevicePrefetcher(Counter(2), sharding, depth=1)
        batch, _, _ = next(prefetcher)
        prefetcher.close()
    assert np.asarray(batch["tokens"]).sum() == 0


def test_transfers_are_explicit_in_the_thread_too(sharding):
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        prefetcher = DevicePrefetcher(Counter(2), sharding, depth=1)
        batch, _, _ = next(prefetcher)
        prefetcher.close()
    finally:
        jax.config.update("jax_transfer_guard", before)
    assert np.asarray(batch["tokens"]).sum() == 0


def test_an_error_reaches_the_caller_after_the_batches_before_it(sharding):
    prefetcher = DevicePrefetcher(Counter(2, OSError("disk gone")), sharding, depth=2)
    next(prefetcher)
    next(prefetcher)
    with pytest.raises(OSError, match="disk gone"):
        next(prefetcher)
    prefetcher.close()


def test_close_ends_the_thread_and_the_iterator(sharding):
    source = Counter(100)
    prefetcher = DevicePrefetcher(source, sharding, depth=2)
    next(prefetcher)
    prefetcher.close()
    prefetcher.close()
    assert source.closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("device-prefetch")]
