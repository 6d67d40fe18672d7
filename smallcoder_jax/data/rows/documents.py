"""Training and validation batches from token shards. This is the only module that uses grain.

Training: each source's documents, reshuffled every epoch and endless -> fill-in-the-middle -> this worker's share ->
mixture -> packing -> shuffled rows -> batches. The share is taken from each shuffled, endless source, not from the
mixture. Two sources of equal weight alternate in the mixture, and if two workers took turns there, each would see only
one source.

Every process of a run packs the same global batches and keeps its own rows of them. Neither the batches nor the
position in the data therefore depend on the number of processes, and no row is repeated or lost. This is affordable
because packing is much faster than training (docs/benchmarks.md).

Shapes: B rows of this process, T places of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from array_record.python.array_record_data_source import ArrayRecordDataSource

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.rows import packing
from smallcoder_jax.data.rows.fim import FillInTheMiddle
from smallcoder_jax.data.tokens.shards import Manifest, SourceEntry, Split, damage_named, read_records
from smallcoder_jax.tokenizers.base import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer

VERSION = 3  # increased whenever the same settings start to give other batches
INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # records are small: threads cost more than they save
BATCHES_AHEAD = 2  # batches that each worker keeps ready
FIM_PIECES = len((FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE))  # ids that rearranging adds to a document


def make_train_iterator(
    manifest: Manifest,
    tokens_folder: Path,
    tokenizer: Tokenizer,
    *,
    data: DataConfig,
    sequence_length: int,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    num_epochs: int | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Training batches [B, T] of this process: tokens, targets, positions, segment_ids, loss_weights.

    They hold the rows `rows` (ascending) of global batches of `batch_size`. By default they are endless and mix the
    sources by their weights per token. With `num_epochs`, every epoch has every document of every source exactly once,
    and the last batch is padded. The global batches depend only on `pipeline_identity`. `get_state()` is small,
    JSON-serialisable and the same on all processes. It describes the position after the batch returned last, from which
    `set_state()` continues. `close()` ends the workers.

    Raises UserError where the tokenizer did not make the shards or lacks the pieces that fill-in-the-middle needs, and
    where a source has no training documents.
    """
    _check_tokenizer(manifest, tokenizer)
    _check_sources(manifest)
    fim = None
    if data.fim_rate > 0 and any(source.fim for source in manifest.sources):
        fim = FillInTheMiddle(tokenizer, rate=data.fim_rate, spm_share=data.fim_spm_share)
    seed %= 2**32  # the largest seeds that grain's shuffle and numpy accept
    sources = [
        grain.MapDataset.source(_Records(tokens_folder, entry.train, manifest.dtype)).map_with_index(
            _Rearrange(fim if entry.fim else None, entry.train.documents, (seed, index))
        )
        for index, entry in enumerate(manifest.sources)
    ]
    workers = max(data.workers, 1)
    batches = []
    for worker in range(workers):
        reader = (worker, workers)
        if num_epochs is None:
            mixed = _mixture(sources, _document_weights(manifest.sources, data.fim_rate), seed, reader)
        else:
            together = grain.MapDataset.concatenate(sources).shuffle(_shuffle_seed(seed, 0))
            mixed = _share(together.repeat(num_epochs), reader)
        batches.append(
            _PackedBatches(
                mixed.to_iter_dataset(INLINE),
                make_packer=functools.partial(_make_packer, data=data, length=sequence_length, seed=(seed, worker)),
                batch_size=batch_size,
                rows=rows,
                length=sequence_length,
                pad_id=tokenizer.pad_id,
            )
        )
    if data.workers == 0:
        return batches[0].__iter__()
    return _in_workers(batches).__iter__()


def validation_batches(
    manifest: Manifest,
    tokens_folder: Path,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    rows: Sequence[int],
    limit_batches: int,
    split: str = "validation",
) -> Iterator[dict[str, np.ndarray]]:
    """A held-out split of all sources in a fixed pseudo-random order. Each token but BOS is predicted once.

    The batches hold the rows `rows` (ascending) of global batches of `batch_size`, so that all processes have the same
    number of batches and the result does not depend on the number of processes. Documents are packed by best fit, which
    cuts only those longer than a row. Yields the first `limit_batches` batches, or all for 0. The last batch is padded.

    In addition to the keys of a training batch there is `bytes`, float32 [B, T]: the number of UTF-8 bytes that each
    target stands for (0 for specials and padding), so that bits per byte = nats / ln 2 / bytes.
    """
    _check_tokenizer(manifest, tokenizer)
    splits = [entry.splits[split] for entry in manifest.sources if split in entry.splits]
    if not any(found.documents for found in splits):
        raise UserError(f"the {split} split holds no documents; raise data.{split}_fraction or prepare more data")
    documents = grain.MapDataset.concatenate(
        [grain.MapDataset.source(_Records(tokens_folder, found, manifest.dtype)) for found in splits if found.documents]
    )
    batches = _PackedBatches(
        documents.shuffle(_shuffle_seed(0, 0)).to_iter_dataset(INLINE),
        make_packer=functools.partial(
            _make_packer, data=DataConfig(packing="best_fit"), length=sequence_length, seed=(0, 0)
        ),
        batch_size=batch_size,
        rows=rows,
        length=sequence_length,
        pad_id=tokenizer.pad_id,
    )
    byte_counts = np.array([len(piece) for piece in tokenizer.token_bytes], np.float32)
    for batch in itertools.islice(batches, limit_batches or None):
        yield {**batch, "bytes": byte_counts[batch["targets"]] * batch["loss_weights"]}


def pipeline_identity(
    manifest: Manifest,
    data: DataConfig,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that determines the batches and their order. It is JSON-serialisable and is compared before a resume,
    because grain itself silently accepts the state of another pipeline.
    """
    return {
        "version": VERSION,
        "grain": importlib.metadata.version("grain"),
        "fingerprint": manifest.fingerprint,
        "tokenizer_hash": manifest.tokenizer_hash,
        "sources": [
            {"spec": entry.spec, "weight": entry.weight, "fim": entry.fim, "documents": entry.train.documents}
            for entry in manifest.sources
        ],
        "packing": data.packing,
        **({"min_tokens": data.min_tokens} if data.packing == "document" else {}),
        "fim_rate": data.fim_rate,
        "fim_spm_share": data.fim_spm_share,
        "workers": data.workers,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
    }


def count_unusable(manifest: Manifest, tokens_folder: Path, min_tokens: int) -> int:
    """The number of training documents that `packing="document"` skips in an epoch. Reads all documents."""
    return sum(
        not packing.is_usable(ids, min_tokens)
        for entry in manifest.sources
        for ids in read_records(tokens_folder, entry.train.files, manifest.dtype)
    )


@dataclasses.dataclass(frozen=True)
class _Rearrange:
    """Fill-in-the-middle whose random numbers depend only on the seed, the source, the epoch and the document."""

    fim: FillInTheMiddle | None
    documents: int
    seed: tuple[int, int]

    def __call__(self, index: int, ids: np.ndarray) -> np.ndarray:
        if self.fim is None:
            return ids
        return self.fim(ids, np.random.default_rng((*self.seed, *divmod(index, self.documents))))


class _Records:
    """The documents of a split by index. Readers are opened on first use, in the process that uses them."""

    def __init__(self, folder: Path, split: Split, dtype: str):
        self._paths = [folder / name for name in split.files]
        with damage_named(folder):
            self._source = ArrayRecordDataSource([str(path) for path in self._paths])
        if len(self._source) != split.documents:
            raise UserError(
                f"{', '.join(map(str, self._paths))}: {len(self._source):,} documents, where the manifest says "
                f"{split.documents:,}. Prepare the data again: delete {folder} and run the same command"
            )
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return np.frombuffer(self._source[index], self._dtype)
        except (RuntimeError, ValueError, OSError):
            file, _ = self._source._reader_idx_and_position(index)  # looked up only on failure, to keep good reads fast
            with damage_named(self._paths[file]):
                return np.frombuffer(self._source[index], self._dtype)


class _PackedBatches(grain.IterDataset[dict[str, np.ndarray]]):
    """Batches packed from a dataset of documents: the rows `rows` of global batches of `batch_size`."""

    def __init__(
        self,
        documents: grain.IterDataset[np.ndarray],
        *,
        make_packer: Callable[[packing.Documents], packing.Packer],
        batch_size: int,
        rows: Sequence[int],
        length: int,
        pad_id: int,
    ):
        super().__init__(documents)
        self._make_packer = make_packer
        self._batch_size, self._rows = batch_size, rows
        self._length = length
        self._pad_id = pad_id

    def __iter__(self) -> _PackedBatchIterator:
        documents = iter(self.parents[0])
        packer = self._make_packer(documents)
        return _PackedBatchIterator(documents, packer, self._batch_size, self._rows, self._length, self._pad_id)


def _make_packer(
    documents: packing.Documents, *, data: DataConfig, length: int, seed: tuple[int, int]
) -> packing.Packer:
    if data.packing == "document":  # each document is one row, and documents are shuffled already
        return packing.DocumentPacker(documents, length, data.min_tokens, data.max_unusable)
    packer = packing.ConcatPacker if data.packing == "concat" else packing.BestFitPacker
    return packing.ShuffledRows(packer(documents, length), length, seed)


class _PackedBatchIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    def __init__(
        self,
        documents: grain.DatasetIterator,
        packer: packing.Packer,
        batch_size: int,
        rows: Sequence[int],
        length: int,
        pad_id: int,
    ):
        super().__init__(documents)
        self._packer = packer
        self._batch_size, self._rows = batch_size, rows
        self._length = length
        self._pad_id = pad_id

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [self._packer.next_row()]
        while len(rows) < self._batch_size:
            try:
                rows.append(self._packer.next_row())
            except StopIteration:
                break
        mine = [rows[row] for row in self._rows if row < len(rows)]
        return packing.fill_batch(mine, len(self._rows), self._length, self._pad_id)

    def get_state(self) -> dict[str, Any]:
        return self._packer.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.set_state(state)


def _mixture(
    sources: Sequence[grain.MapDataset[np.ndarray]], weights: Sequence[float], seed: int, reader: tuple[int, int]
) -> grain.MapDataset[np.ndarray]:
    shares = [
        _share(source.shuffle(_shuffle_seed(seed, index)).repeat(None), reader) for index, source in enumerate(sources)
    ]
    return grain.MapDataset.mix(shares, weights)


def _share(documents: grain.MapDataset[np.ndarray], reader: tuple[int, int]) -> grain.MapDataset[np.ndarray]:
    """Every n-th document, for reader i of n. Together the readers have each document exactly once."""
    index, count = reader
    return documents.slice(slice(index, None, count))


def _shuffle_seed(seed: int, source: int) -> int:
    """A seed far from those of other sources and runs, because grain's shuffle uses seed + epoch."""
    return int(np.random.SeedSequence((seed, source)).generate_state(1)[0])


def _document_weights(sources: Sequence[SourceEntry], fim_rate: float) -> list[float]:
    """The weights per document that give the sources' weights per token."""
    lengths = [
        entry.train.tokens / entry.train.documents + (FIM_PIECES * fim_rate if entry.fim else 0.0) for entry in sources
    ]
    return [entry.weight / length for entry, length in zip(sources, lengths, strict=True)]


def _in_workers(batches: Sequence[_PackedBatches]) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Runs each dataset in its own process; the processes take turns in a fixed order."""
    if not flags.FLAGS.is_parsed():
        # grain passes its flags to the processes and fails where nothing has parsed them, as in tests and notebooks.
        flags.FLAGS.mark_as_parsed()
    one = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=BATCHES_AHEAD)
    processes = [dataset.mp_prefetch(one, worker_init_fn=_become_worker) for dataset in batches]
    in_turn = grain.experimental.InterleaveIterDataset(processes, cycle_length=len(processes))
    return in_turn.map(_out_of_shared_memory)


def _become_worker(_: int, __: int) -> None:
    """Makes a worker end with its parent: no signal to the process group ends it earlier, and it never outlives it."""
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # the parent may need one more batch before it saves its state
        signal.signal(interrupt, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _out_of_shared_memory(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Copied, because batches arrive in shared memory, which is small in containers and must not outlive this program.
    return {key: np.array(value) for key, value in batch.items()}


def _check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(
            f"the token shards were made with the tokenizer {manifest.tokenizer_hash}, not with {tokenizer.hash}; "
            "prepare the data again with this tokenizer or use the one that the shards were made with"
        )


def _check_sources(manifest: Manifest) -> None:
    for entry in manifest.sources:
        if entry.train.documents == 0:
            raise UserError(
                f"source {entry.spec} holds no training documents; remove it from data.sources or add files"
            )
        if entry.weight <= 0:
            raise UserError(f"source {entry.spec} has the weight {entry.weight}; give it one above 0 or remove it")
