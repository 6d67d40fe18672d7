"""Tokens per second of the input pipeline, compared with Hugging Face `datasets` and a plain PyTorch DataLoader.

    python -m tools.bench.data [--sources stdlib] [--seconds 10] [--check] [--record] [--json]

Both read the same tokenised documents in random order, rearrange half of them for fill-in-the-middle, pack them into
rows by concatenation, and yield batches with positions, segments and weights, all on two cores. Ours cuts between
characters and encodes the text around the cuts again; the DataLoader cuts between tokens, which is cheaper. Ours
resumes exactly, which is checked first.

--check ends with exit code 3 if ours is below 3 million tokens per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.config import Config, DataConfig, DecoderConfig, TokenizerConfig
from smallcoder_jax.data.rows import packing
from smallcoder_jax.data.rows.documents import make_train_iterator
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.prepare import Prepared, prepare
from smallcoder_jax.tokenizers.base import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure

WANTED = 3_000_000  # tokens per second
CORES = 2
FIM_RATE, FIM_SPM_SHARE = 0.5, 0.5
TOKENIZER_BYTES = 4_000_000


def main(argv: list[str] | None = None) -> int | None:
    parser = ArgumentParser(
        prog="python -m tools.bench.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", default="stdlib", help="sources of the documents, in the form of data.sources")
    parser.add_argument("--data-dir", type=Path, help="folder for prepared data; default: a temporary folder")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="worker processes to measure with")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per measurement")
    parser.add_argument("--check", action="store_true", help=f"fail below {WANTED:,} tokens per second")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as scratch:
        prepared = _prepare(options, Path(scratch) / "data")
        rows = [_measure_ours(prepared, workers, options) for workers in options.workers]
        rows += _measure_torch(prepared, Path(scratch) / "arrow", options)
    documents = sum(source.train.documents for source in prepared.manifest.sources)
    tokens = sum(source.train.tokens for source in prepared.manifest.sources)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {CORES} cores, Python {platform.python_version()}",
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "fim_rate": FIM_RATE,
        "documents": documents,
        "mean_document_tokens": round(tokens / documents, 1),
        "rows": rows,
    }
    say(json.dumps(result, indent=1) if options.json else _table(result))
    if options.record:
        benchmarks.record("data", figures(result))
    slow = [row for row in rows if row["pipeline"] == "grain" and row["tokens_per_second"] < WANTED]
    if options.check and slow:
        raise CheckFailed(
            f"{slow[0]['tokens_per_second']:,} tokens/s with {slow[0]['workers']} workers, wanted {WANTED:,}; "
            "make sure that nothing else runs on this machine"
        )
    return None


def _prepare(options: argparse.Namespace, scratch: Path) -> Prepared:
    return prepare(
        Config(
            model=DecoderConfig(vocab_size=options.vocab_size),
            tokenizer=TokenizerConfig(train_bytes=TOKENIZER_BYTES),
            data=DataConfig(sources=options.sources, dir=str(options.data_dir or scratch)),
        )
    )


def _measure_ours(prepared: Prepared, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    def make() -> Any:
        return make_train_iterator(
            prepared.manifest,
            prepared.tokens_folder,
            prepared.tokenizer,
            data=DataConfig(workers=workers, fim_rate=FIM_RATE, fim_spm_share=FIM_SPM_SHARE, packing="concat"),
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            rows=range(options.batch_size),
            seed=0,
        )

    iterator, resumed = make(), make()
    next(iterator)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    wanted, got = next(iterator), next(resumed)
    resumed.close()
    if not all(np.array_equal(wanted[key], got[key]) for key in wanted):
        raise CheckFailed(f"the pipeline with {workers} workers does not resume with the next batch")
    speed = _tokens_per_second(iterator, options.seconds)
    iterator.close()
    return {"pipeline": "grain", "workers": workers, "resumes_exactly": True, "tokens_per_second": speed}


def _measure_torch(prepared: Prepared, scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        import datasets
        import torch.utils.data
    except ImportError as error:
        raise UserError(f"the comparison needs {error.name}; run: pip install 'smallcoder_jax[hub,parity]'") from error
    datasets.disable_progress_bars()
    manifest, tokenizer = prepared.manifest, prepared.tokenizer
    stored = datasets.Dataset.from_generator(
        lambda: (
            {"ids": ids}
            for source in manifest.sources
            for ids in shards.read_records(prepared.tokens_folder, source.train.files, manifest.dtype)
        ),
        features=datasets.Features({"ids": datasets.List(datasets.Value(manifest.dtype))}),
        cache_dir=str(scratch),
    )
    shuffled = stored.shuffle(seed=0).flatten_indices(cache_file_name=str(scratch / "shuffled.arrow"))

    class Packed(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            worker = torch.utils.data.get_worker_info()
            part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
            documents = _TokenLevelDocuments(shuffled.with_format("numpy"), tokenizer, part, parts)
            packer = packing.ConcatPacker(documents, options.sequence_length)
            while True:
                batch = packing.fill_batch([packer.next_row()], 1, options.sequence_length, tokenizer.pad_id)
                yield {key: torch.from_numpy(value[0]) for key, value in batch.items()}

    rows = []
    for workers in options.workers:
        loader = torch.utils.data.DataLoader(Packed(), batch_size=options.batch_size, num_workers=workers)
        speed = _tokens_per_second(iter(loader), options.seconds)
        row = {"pipeline": "datasets + DataLoader", "workers": workers, "resumes_exactly": False}
        rows.append({**row, "tokens_per_second": speed})
    return rows


class _TokenLevelDocuments:
    """The endless stream of a worker's share of the documents, half of them rearranged by cuts between tokens."""

    def __init__(self, documents: Any, tokenizer: Tokenizer, part: int, parts: int):
        self._documents = documents
        self._specials = [tokenizer.specials[piece] for piece in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]
        self._order = itertools.cycle(range(part, len(documents), parts))
        self._rng = np.random.default_rng(part)

    def __next__(self) -> np.ndarray:
        ids = self._documents[next(self._order)]["ids"]
        if self._rng.random() >= FIM_RATE or len(ids) < 4:
            return ids
        first, second = np.sort(self._rng.integers(1, len(ids), 2))
        prefix, middle, suffix = ids[1:first], ids[first:second], ids[second:-1]
        pre, suf, mid = self._specials
        if self._rng.random() < FIM_SPM_SHARE:
            parts = [pre, suf], suffix, [mid], prefix, middle
        else:
            parts = [pre], prefix, [suf], suffix, [mid], middle
        return np.concatenate([ids[:1], *parts, ids[-1:]])

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("this loader cannot resume")


def _tokens_per_second(batches: Iterator[dict[str, Any]], seconds: float) -> int:
    for _ in range(8):  # until processes have started and files are open
        next(batches)
    tokens = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        shape = next(batches)["tokens"].shape
        tokens += shape[0] * shape[1]
    return round(tokens / elapsed)


def figures(result: dict[str, Any]) -> list[Figure]:
    """The figures to record for each pipeline, ours with the limit of --check."""
    note = f"rows of {result['sequence_length']}, {result['batch_size']} to a batch"
    return [
        Figure(f"ours, {row['workers']} workers: tokens/s", row["tokens_per_second"], None, f"≥ {WANTED / 1e6:g}M",
               row["tokens_per_second"] >= WANTED, note)
        if row["pipeline"] == "grain"
        else Figure(f"{row['pipeline']}, {row['workers']} workers: tokens/s", row["tokens_per_second"], note=note)
        for row in result["rows"]
    ]  # fmt: skip


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}; rows of {result['sequence_length']}, {result['batch_size']} to a batch, "
        f"fill-in-the-middle rate {result['fim_rate']}; {result['documents']:,} documents of "
        f"{result['mean_document_tokens']:,} tokens on average",
        f"{'pipeline':<24}{'workers':>8}{'resumes':>9}{'tokens/s':>14}",
    ]
    for row in result["rows"]:
        resumes = "exactly" if row["resumes_exactly"] else "no"
        lines.append(f"{row['pipeline']:<24}{row['workers']:>8}{resumes:>9}{row['tokens_per_second']:>14,}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
