import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.rows import packing
from smallcoder_jax.data.rows.documents import (
    count_unusable,
    make_train_iterator,
    pipeline_identity,
    validation_batches,
)
from smallcoder_jax.data.rows.fim import MIN_CHARACTERS
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.tokenizers.base import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX

PAD, BOS, EOS, PREFIX, SUFFIX, MIDDLE = range(1000, 1006)
LENGTH = 32


class ToyTokenizer:
    """Ids 0..999 are one byte each; nothing merges."""

    vocab_size = 1010
    pad_id, bos_id, eos_id = PAD, BOS, EOS
    specials: dict[str, int]
    token_bytes: list[bytes]
    hash = "toy"

    def __init__(self):
        self.specials = {FIM_PREFIX: PREFIX, FIM_SUFFIX: SUFFIX, FIM_MIDDLE: MIDDLE}
        self.token_bytes = [b"x"] * 1000 + [b""] * 10

    def encode(self, text):
        raise AssertionError("nothing merges, so nothing is encoded again")

    def encode_batch(self, texts, threads):
        raise AssertionError("nothing merges, so nothing is encoded again")

    def borders(self, ids):
        return np.ones(len(ids), bool)

    def decode(self, ids):
        return "x" * sum(id < 1000 for id in ids)

    def save(self, folder):
        raise NotImplementedError


def documents(rng, count, mean, first_id=0, ids=1000):
    """Documents of exponential length whose ids lie in [first_id, first_id + ids)."""
    for _ in range(count):
        length = int(rng.exponential(mean)) + 1
        yield np.array([BOS, *rng.integers(first_id, first_id + ids, length), EOS]), length


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    sources = [
        shards.SourceTokens("a", 1.0, True, documents(rng, 150, 60, 0, 500), documents(rng, 300, 30, 0, 500)),
        shards.SourceTokens("b", 3.0, False, documents(rng, 90, 12, 500, 500), documents(rng, 30, 20, 500, 500)),
    ]
    manifest = shards.write_tokens(folder, sources, vocab_size=1010, tokenizer_hash="toy", tokenizer="../t")
    return manifest, folder


def iterate(prepared, *, rows=None, num_epochs=None, seed=3, batch_size=4, length=LENGTH, **data):
    manifest, folder = prepared
    return make_train_iterator(
        manifest,
        folder,
        ToyTokenizer(),
        data=DataConfig(**data),
        sequence_length=length,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        seed=seed,
        num_epochs=num_epochs,
    )


def stored(prepared, split):
    manifest, folder = prepared
    return [
        ids
        for source in manifest.sources
        for ids in shards.read_records(folder, getattr(source, split).files, manifest.dtype)
    ]


def pieces(batches):
    """(tokens, targets, positions) of every segment of every row."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                places = batch["segment_ids"][row] == segment
                yield tuple(batch[key][row][places] for key in ("tokens", "targets", "positions"))


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def counted_targets(batches):
    return collections.Counter(
        np.concatenate([batch["targets"][batch["loss_weights"] > 0] for batch in batches]).tolist()
    )


@pytest.mark.parametrize("packer", ["concat", "best_fit"])
def test_rows_hold_whole_next_token_pairs(prepared, packer):
    iterator = iterate(prepared, packing=packer, fim_rate=0.0)
    batches = [next(iterator) for _ in range(20)]
    for batch in batches:
        assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
            "tokens": ("int32", (4, LENGTH)),
            "targets": ("int32", (4, LENGTH)),
            "positions": ("int32", (4, LENGTH)),
            "segment_ids": ("int32", (4, LENGTH)),
            "loss_weights": ("float32", (4, LENGTH)),
        }
        assert np.array_equal(batch["loss_weights"], (batch["segment_ids"] > 0).astype(np.float32))
        for segments in batch["segment_ids"]:
            filled = segments[segments > 0]
            assert segments[: len(filled)].all()  # padding only at the end
            assert filled[0] == 1
            assert set(np.diff(filled)) <= {0, 1}
        assert np.all(batch["tokens"][batch["segment_ids"] == 0] == PAD)
    known = {tuple(ids[i : i + 2]) for ids in stored(prepared, "train") for i in range(len(ids) - 1)}
    for tokens, targets, positions in pieces(batches):
        assert np.array_equal(tokens[1:], targets[:-1])
        assert np.array_equal(positions, np.arange(len(tokens)))
        assert BOS not in targets
        assert EOS not in tokens
        assert BOS not in tokens[1:]
        assert set(zip(tokens, targets, strict=True)) <= known


def test_concat_fills_every_row(prepared):
    iterator = iterate(prepared, packing="concat")
    assert all(next(iterator)["loss_weights"].all() for _ in range(30))


def test_best_fit_cuts_only_documents_longer_than_a_row(prepared):
    short = [tuple(ids) for ids in stored(prepared, "train") if len(ids) - 1 <= LENGTH]
    seen = {
        (*tokens, targets[-1])
        for tokens, targets, _ in pieces(iterate(prepared, packing="best_fit", fim_rate=0.0, num_epochs=1))
    }
    assert set(short) <= seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_is_the_beginning_of_one_usable_document(prepared, workers):
    iterator = iterate(prepared, packing="document", min_tokens=20, fim_rate=0.0, batch_size=1, workers=workers)
    usable = {tuple(ids[: LENGTH + 1]) for ids in stored(prepared, "train") if len(ids) - 2 >= 20}
    manifest, folder = prepared
    assert 0 < count_unusable(manifest, folder, 20) < sum(source.train.documents for source in manifest.sources)
    assert count_unusable(manifest, folder, 20) == sum(len(ids) - 2 < 20 for ids in stored(prepared, "train"))
    for _ in range(150):
        ((tokens, targets, positions),) = pieces([next(iterator)])
        assert (*tokens, targets[-1]) in usable
        assert np.array_equal(positions, np.arange(len(tokens)))
    iterator.close()


def test_an_epoch_of_documents_holds_every_usable_one_once(prepared):
    batches = iterate(prepared, packing="document", min_tokens=20, fim_rate=0.0, num_epochs=1)
    found = collections.Counter((*tokens, targets[-1]) for tokens, targets, _ in pieces(batches))
    assert found == collections.Counter(
        tuple(ids[: LENGTH + 1]) for ids in stored(prepared, "train") if len(ids) - 2 >= 20
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unusable_documents_in_a_row_are_an_error(prepared, workers):
    longest = max(len(ids) - 2 for ids in stored(prepared, "train"))
    settings = {"packing": "document", "fim_rate": 0.0, "workers": workers, "batch_size": 1}
    iterator = iterate(prepared, **settings, min_tokens=longest + 1, max_unusable=700)
    with pytest.raises(Exception, match=f"700 documents in a row were unusable.* fewer than {longest + 1} tokens"):
        next(iterator)
    iterator.close()


def test_best_fit_wastes_little_and_fits_tightly():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, 2000)
    rows = packing.best_fit([np.zeros(n + 1) for n in lengths], 100)
    used = [sum(len(piece) - 1 for piece in row) for row in rows]
    assert max(used) <= 100
    assert sum(used) == lengths.sum()
    assert len(rows) <= lengths.sum() / 100 * 1.02 + 1


@pytest.mark.parametrize(
    ("packer", "processes", "workers"), [("concat", 1, 0), ("best_fit", 1, 0), ("concat", 2, 0), ("best_fit", 4, 2)]
)
def test_an_epoch_holds_every_token_exactly_once(prepared, packer, processes, workers):
    batches = []
    for process in range(processes):
        rows = range(process * 4 // processes, (process + 1) * 4 // processes)
        iterator = iterate(prepared, rows=rows, packing=packer, workers=workers, num_epochs=2, fim_rate=0.0)
        batches += list(iterator)
        iterator.close()
    wanted = collections.Counter(np.concatenate([ids[1:] for ids in stored(prepared, "train")]).tolist())
    assert counted_targets(batches) == {id: 2 * count for id, count in wanted.items()}


@pytest.mark.parametrize("settings", [{"packing": "concat"}, {"packing": "best_fit", "workers": 2}])
def test_processes_share_the_batches_and_the_place_in_the_data(prepared, settings):
    whole = iterate(prepared, **settings)
    parts = [iterate(prepared, rows=rows, **settings) for rows in ([0, 2], [1, 3])]
    for _ in range(12):
        batch, (even, odd) = next(whole), [next(part) for part in parts]
        assert same({key: value[::2] for key, value in batch.items()}, even)
        assert same({key: value[1::2] for key, value in batch.items()}, odd)
        assert all(part.get_state() == whole.get_state() for part in parts)
    for iterator in (whole, *parts):
        iterator.close()


def test_fill_in_the_middle_loses_no_token(prepared):
    batches = list(iterate(prepared, num_epochs=1, fim_rate=1.0))
    got = counted_targets(batches)
    wanted = collections.Counter(np.concatenate([ids[1:] for ids in stored(prepared, "train")]).tolist())
    assert {id: count for id, count in got.items() if id not in (PREFIX, SUFFIX, MIDDLE)} == wanted
    eligible = sum(len(ids) - 2 >= MIN_CHARACTERS for ids in stored(prepared, "train") if ids[1] < 500)
    assert got[PREFIX] == got[SUFFIX] == got[MIDDLE] == eligible


def test_sources_may_opt_out_of_fill_in_the_middle(prepared):
    manifest, folder = prepared
    closed = dataclasses.replace(
        manifest, sources=tuple(dataclasses.replace(source, fim=False) for source in manifest.sources)
    )
    batches = list(iterate((closed, folder), num_epochs=1, fim_rate=1.0))
    assert PREFIX not in counted_targets(batches)


def test_every_epoch_has_its_own_order_and_draws(prepared):
    manifest, folder = prepared
    alone = dataclasses.replace(manifest, sources=manifest.sources[:1])
    two = list(iterate((alone, folder), num_epochs=2, fim_rate=0.0))
    rows = [row.tobytes() for batch in two for row in batch["tokens"]]
    assert len(set(rows)) > 0.9 * len(rows)  # in one order, both epochs would be cut into the same rows
    rearranged = [
        counted_targets(list(iterate((alone, folder), num_epochs=epochs, fim_rate=0.5)))[PREFIX] for epochs in (1, 2)
    ]
    assert rearranged[1] != 2 * rearranged[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_per_token(prepared, workers):
    iterator = iterate(prepared, batch_size=16, length=128, workers=workers)
    ids = np.concatenate([next(iterator)["targets"].ravel() for _ in range(40)])
    iterator.close()
    ids = ids[ids < 1000]
    assert (ids < 500).mean() == pytest.approx(0.25, abs=0.03)


def test_every_worker_sees_every_source(prepared):
    # Sources that alternate and workers that take turns in the mixture would leave each worker with one source.
    manifest, folder = prepared
    even = dataclasses.replace(
        manifest,
        sources=tuple(dataclasses.replace(s, weight=s.train.tokens / s.train.documents) for s in manifest.sources),
    )
    iterator = iterate((even, folder), workers=2, fim_rate=0.0)
    batches = [next(iterator)["targets"].ravel() for _ in range(80)]
    iterator.close()
    for worker in range(2):
        ids = np.concatenate(batches[worker::2])
        assert (ids < 500).any()
        assert ((ids >= 500) & (ids < 1000)).any()


@pytest.mark.parametrize("packer", ["concat", "best_fit", "document"])
def test_resumes_at_every_batch(prepared, packer):
    iterator = iterate(prepared, packing=packer, batch_size=3)
    states, batches = [iterator.get_state()], []
    for _ in range(60):
        batches.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    for index in range(0, 58):
        resumed = iterate(prepared, packing=packer, batch_size=3)
        resumed.set_state(states[index])
        assert resumed.get_state() == states[index]
        assert same(next(resumed), batches[index])
        assert same(next(resumed), batches[index + 1])
    assert max(len(json.dumps(state)) for state in states) < 200


@pytest.mark.parametrize(
    "packer", ["concat", *(pytest.param(name, marks=pytest.mark.slow) for name in ("best_fit", "document"))]
)
def test_resumes_with_workers(prepared, packer):
    iterator = iterate(prepared, packing=packer, workers=2)
    states, batches = [iterator.get_state()], []
    for _ in range(12):
        batches.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    iterator.close()
    resumed = iterate(prepared, packing=packer, workers=2)
    for index in (0, 5, 8):
        resumed.set_state(states[index])
        assert all(same(next(resumed), batch) for batch in batches[index : index + 4])
    resumed.close()
    fresh = iterate(prepared, packing=packer, workers=2)
    fresh.set_state(states[7])
    assert all(same(next(fresh), batch) for batch in batches[7:])
    fresh.close()


STOPPED_FROM_OUTSIDE = """
import os, pathlib, signal, sys
from smallcoder_jax.data.tokens import shards
from tests.data.rows.test_documents import iterate

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: None)
    iterator = iterate((shards.read_manifest(folder), folder), workers=2)
    next(iterator), next(iterator)
    os.killpg(0, signal.SIGTERM)
    for _ in range(20):
        next(iterator)
    print("went on", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_ignore_signals_to_the_group_and_end_with_their_parent(prepared, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOPPED_FROM_OUTSIDE)
    process = subprocess.Popen(
        [sys.executable, str(script), str(prepared[1])],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
    )
    # Workers share the pipe: its end is read only once the last of them is gone.
    output, _ = process.communicate(timeout=60)
    assert output == b"went on\n"


def test_resumes_at_the_end(prepared):
    iterator = iterate(prepared, num_epochs=1)
    batches = list(iterator)
    resumed = iterate(prepared, num_epochs=1)
    resumed.set_state(iterator.get_state())
    assert next(resumed, None) is None
    assert len(batches) > 1


def test_same_settings_same_batches_and_other_seed_other_batches(prepared):
    first, again, other = (iterate(prepared, seed=seed) for seed in (1, 1, 2))
    batch = next(first)
    assert same(batch, next(again))
    assert not same(batch, next(other))


def validate(prepared, batch_size=4, limit=0, rows=None):
    manifest, folder = prepared
    return list(
        validation_batches(
            manifest,
            folder,
            ToyTokenizer(),
            sequence_length=LENGTH,
            batch_size=batch_size,
            rows=range(batch_size) if rows is None else rows,
            limit_batches=limit,
        )
    )


def test_validation_predicts_every_token_once(prepared):
    batches = validate(prepared)
    wanted = collections.Counter(np.concatenate([ids[1:] for ids in stored(prepared, "validation")]).tolist())
    assert counted_targets(batches) == wanted
    assert all(batch["tokens"].shape == (4, LENGTH) for batch in batches)
    text = sum(count for id, count in wanted.items() if id < 1000)
    assert sum(batch["bytes"].sum() for batch in batches) == text
    assert all(np.all(batch["bytes"][batch["targets"] >= 1000] == 0) for batch in batches)
    assert batches[0]["bytes"].dtype == np.float32


def test_validation_is_fixed_and_a_limit_takes_the_front_of_all_sources(prepared):
    batches = validate(prepared)
    assert all(same(left, right) for left, right in zip(validate(prepared, limit=3), batches[:3], strict=True))
    ids = np.concatenate([batch["targets"].ravel() for batch in batches[:3]])
    assert (ids < 500).any()
    assert ((ids >= 500) & (ids < 1000)).any()


def test_validation_is_the_same_on_any_number_of_processes(prepared):
    whole = validate(prepared)
    parts = [validate(prepared, rows=rows) for rows in (range(2), range(2, 4))]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for left, right, batch in zip(*parts, whole, strict=True):
        assert same({key: np.concatenate([left[key], right[key]]) for key in batch}, batch)


def test_identity_changes_with_everything_that_decides_the_batches(prepared):
    manifest, _ = prepared
    source = manifest.sources[0]
    settings = {"sequence_length": 32, "batch_size": 4, "seed": 0}
    base = pipeline_identity(manifest, DataConfig(), **settings)
    assert json.loads(json.dumps(base)) == base
    others = [
        pipeline_identity(dataclasses.replace(manifest, **change), DataConfig(), **settings)
        for change in (
            {"fingerprint": "other"},
            {"tokenizer_hash": "other"},
            {"sources": manifest.sources[1:]},
            {"sources": (dataclasses.replace(source, weight=9.0), *manifest.sources[1:])},
            {"sources": (dataclasses.replace(source, fim=False), *manifest.sources[1:])},
        )
    ]
    others += [
        pipeline_identity(manifest, DataConfig(**{key: value}), **settings)
        for key, value in {"packing": "best_fit", "fim_rate": 0.1, "fim_spm_share": 0.1, "workers": 2}.items()
    ]
    others += [pipeline_identity(manifest, DataConfig(), **{**settings, key: 77}) for key in settings]
    one = [pipeline_identity(manifest, DataConfig(packing="document", min_tokens=n), **settings) for n in (16, 17)]
    assert one[0] != one[1]
    assert all(other != base for other in others)
    assert pipeline_identity(manifest, DataConfig(prefetch=9), **settings) == base


def test_refuses_another_tokenizer(prepared):
    manifest, folder = prepared
    with pytest.raises(UserError, match="prepare the data again"):
        iterate((dataclasses.replace(manifest, tokenizer_hash="other"), folder))


def test_refuses_a_source_without_documents(prepared):
    manifest, folder = prepared
    empty = dataclasses.replace(manifest.sources[0], train=shards.Split((), 0, 0, 0))
    with pytest.raises(UserError, match="no training documents"):
        iterate((dataclasses.replace(manifest, sources=(empty, manifest.sources[1])), folder))
    none = dataclasses.replace(manifest.sources[0], validation=shards.Split((), 0, 0, 0))
    with pytest.raises(UserError, match="validation_fraction"):
        validate((dataclasses.replace(manifest, sources=(none,)), folder))
