"""Moves batches to the devices before they are needed, on a thread other than the one that dispatches steps."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from smallcoder_jax.base.faults import NONE, Faults
from smallcoder_jax.mesh import place_batch


class BatchIterator(Protocol):
    """An iterator over this process's part of each batch, whose position can be saved and restored."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class DevicePrefetcher:
    """Yields (global device batch, iterator state after this batch, seconds the caller had to wait for it).

    One background thread reads from `iterator` and starts the transfers, `depth` batches ahead. With `depth` 0 it reads
    a batch only on request, for batches that depend on what was learned from the batches before. The state returned
    with a batch is the one to checkpoint after that batch is used, because the iterator itself is further ahead. An
    error of the iterator is raised by the `next` that would have returned its batch; after it there are no more
    batches.

    `sharding` places each array; its first axis is split over the processes. The prefetcher takes ownership of
    `iterator`: `close` ends the thread and closes the iterator.
    """

    def __init__(self, iterator: BatchIterator, sharding: NamedSharding, depth: int, faults: Faults = NONE):
        self._iterator = iterator
        self._sharding = sharding
        self._faults = faults
        self._failed = False
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device-prefetch")
        self._depth = depth
        self._pending = collections.deque(self._executor.submit(self._load) for _ in range(depth))

    def _load(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        self._faults.reach("data")
        batch = next(self._iterator)
        state = self._iterator.get_state()
        return place_batch(self._sharding, batch), state

    def __iter__(self) -> DevicePrefetcher:
        return self

    def __next__(self) -> tuple[dict[str, jax.Array], dict[str, Any], float]:
        if not self._pending and not self._failed and self._depth == 0:
            self._pending.append(self._executor.submit(self._load))
        if not self._pending:
            raise StopIteration
        start = time.perf_counter()
        concurrent.futures.wait([self._pending[0]])
        waited = time.perf_counter() - start
        first = self._pending.popleft()
        if first.exception() is not None:
            self._failed = True
            self._cancel()
        batch, state = first.result()
        if self._depth:
            self._pending.append(self._executor.submit(self._load))
        return batch, state, waited

    def _cancel(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Ends the thread, drops the batches loaded ahead and closes the iterator. May be called repeatedly."""
        self._cancel()
        self._executor.shutdown(wait=True)
        self._iterator.close()
