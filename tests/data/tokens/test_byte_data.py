"""Data for a model of bytes, from every kind of source; documents that are set apart for a test."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, from_config_dict, to_dict
from smallcoder_jax.data.corpus.corpus import read_accounting, read_split
from smallcoder_jax.data.tokens import prepare, shards
from smallcoder_jax.data.tokens.prepare import Prepared
from smallcoder_jax.data.tokens.statistics import format_report
from smallcoder_jax.data.tokens.validate import validate

MakeConfig = Callable[..., Config]
STORIES = "hf:roneneldan/TinyStories"


def stories(count: int) -> list[str]:
    """Little texts with characters of two, three and four bytes, and line ends of both kinds."""
    rng = random.Random(0)
    names, things = ["Zoë", "Łukasz", "小明", "Ben"], ["a crêpe", "a 🐉", "a red\r\nkite", "the sun"]
    return [
        f"Story {i}. {rng.choice(names)} saw {rng.choice(things)} and said: “How lovely!”\n{'Then all slept. ' * 2}"
        for i in range(count)
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the hub: the stories that it holds."""
    texts = stories(600)

    def load(name: str, *args: object, **options: object) -> datasets.Dataset:
        assert (name, options["split"]) == ("roneneldan/TinyStories", "train")
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return texts


def ids_of(prepared: Prepared, split: str) -> list[bytes]:
    """The ids of every document as values of bytes."""
    assert prepared.manifest.dtype == "uint16"
    files = prepared.manifest.sources[0].splits[split].files
    return [
        ids.astype(np.uint8).tobytes()
        for ids in shards.read_records(prepared.tokens_folder, files, prepared.manifest.dtype)
    ]


def write_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    import tensorflow_datasets as tfds

    from smallcoder_jax.data.corpus import builder
    from smallcoder_jax.data.sources.document import Document

    texts = stories(40)
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_bytes(text.encode())
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "rows.parquet")
    documents = [Document(text, "stories", f"{number}", "", "") for number, text in enumerate(texts)]
    builder.store(folder / "tfds", {"train": lambda: iter(documents)})
    info = next((folder / "tfds").glob("*/*/dataset_info.json"))
    stored = tfds.builder_from_directory(info.parent)
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: stored)
    return {
        "folder": f"dir:{folder / 'texts'}",
        "jsonl": f"jsonl:{folder / 'rows.jsonl'}",
        "parquet": f"parquet:{folder / 'rows.parquet'}",
        "tfds": "tfds:tiny_stories",
        "hub": STORIES,
        "library": "stdlib",
        "pages": "prose",
    }


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "tfds", "hub", "library", "pages"])
def test_every_source_gives_bytes(
    kind: str, hub: list[str], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_sources(tmp_path, monkeypatch)[kind]
    prepared = prepare.prepare(make_config(spec, test_fraction=0.2, max_documents=40))
    assert validate(prepared, 1.0, lambda line: None) == []
    written = []
    for split in ("train", "validation", "test"):
        texts = [document.text.encode() for document in read_split(prepared.corpus_folder, split)]
        assert ids_of(prepared, split) == [b"\xfe" + text + b"\xff" for text in texts]
        assert texts
        written += texts
    assert len(written) == 40
    if kind not in ("library", "pages"):
        assert sorted(written) == sorted(text.encode() for text in stories(40))


@pytest.fixture
def apart(hub: list[str], make_config: MakeConfig) -> Prepared:
    """TinyStories, 80/10/10."""
    return prepare.prepare(make_config(STORIES, validation_fraction=0.1, test_fraction=0.1))


def test_eighty_ten_ten(apart: Prepared, hub: list[str], make_config: MakeConfig) -> None:
    sides = {split: set(ids_of(apart, split)) for split in ("train", "validation", "test")}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) == len(hub)
    shares = {split: len(texts) / len(hub) for split, texts in sides.items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.03)
    (entry,) = read_accounting(apart.corpus_folder)["sources"]
    assert [entry[split]["documents"] for split in sides] == [len(texts) for texts in sides.values()]
    # Which documents are validated on does not depend on those that are set apart.
    without = prepare.prepare(make_config(STORIES, validation_fraction=0.1))
    assert set(ids_of(without, "validation")) == sides["validation"]
    assert set(ids_of(without, "train")) == sides["train"] | sides["test"]
    assert "test" not in without.manifest.sources[0].splits
    assert without.corpus_folder != apart.corpus_folder


def test_statistics_count_all_three(apart: Prepared) -> None:
    report = format_report(apart.manifest)
    counts = {line.split()[0]: line.split()[1] for line in report.splitlines() if len(line.split()) == 2}
    entry = apart.manifest.sources[0]
    assert counts["test"] == str(entry.splits["test"].documents)
    assert counts["tokens"] == f"{sum(split.tokens for split in entry.splits.values()):,}"
    assert counts["bytes/token"] == "1.00"
    assert set(apart.accounting["tokens"][STORIES]) == {"train", "validation", "test"}


def test_a_manifest_without_a_test_split_is_read(hub: list[str], make_config: MakeConfig) -> None:
    """As those are that were written before there was one."""
    prepared = prepare.prepare(make_config(STORIES))
    path = prepared.tokens_folder / shards.MANIFEST
    content = json.loads(path.read_text())
    assert content["sources"][0].pop("test") is None
    path.write_text(json.dumps(content))
    assert shards.read_manifest(prepared.tokens_folder) == prepared.manifest
    content["sources"][0]["train"] = None
    with pytest.raises(ValueError, match="TypeError"):
        shards.parse_manifest(content)
    assert shards.compute_fingerprint(prepared.tokens_folder, prepared.manifest) == prepared.manifest.fingerprint


def test_a_changed_test_document_is_noticed(apart: Prepared) -> None:
    files = {split: apart.tokens_folder / found.files[0] for split, found in apart.manifest.sources[0].splits.items()}
    assert {path.name for path in files.values()} == apart.manifest.checksums.keys()
    shutil.copy(files["validation"], files["test"])
    assert shards.compute_fingerprint(apart.tokens_folder, apart.manifest) != apart.manifest.fingerprint
    assert any(line.startswith(f"{STORIES}, test: ") for line in validate(apart, 0.0, lambda line: None))


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    values = to_dict(config)
    return from_config_dict({name: {**values[name], **sections.get(name, {})} for name in ("model", "tokenizer", "data",
                             "stage", "eval", "train")})  # fmt: skip


def test_fractions_that_leave_nothing_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation_fraction=0.5 and data.test_fraction=0.5 must be less than 1"):
        make_config("stdlib", validation_fraction=0.5, test_fraction=0.5)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(2)))
    with pytest.raises(UserError, match=r"the test split is empty.* gave 2 documents .*data.test_fraction=0.1"):
        prepare.prepare(make_config(f"jsonl:{rows}", test_fraction=0.1))


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.79])
@pytest.mark.parametrize("count", [3, 10])
def test_of_a_few_documents_at_least_one_is_on_each_side(
    count: int, fraction: float, make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(count)))
    prepared = prepare.prepare(make_config(f"jsonl:{rows}", test_fraction=fraction))
    sizes = [split.documents for split in prepared.manifest.sources[0].splits.values()]
    assert len(sizes) == 3
    assert min(sizes) >= 1
    assert sum(sizes) == count


def test_a_test_split_that_is_not_there_cannot_be_measured(make_config: MakeConfig) -> None:
    config = make_config("stdlib", test_fraction=0.1)
    assert changed(config, eval={"split": "test"}).eval.split == "test"
    with pytest.raises(UserError, match=r"eval.split='test' is for a stage that reads documents .*test_fraction=0.0"):
        changed(dataclasses.replace(config, data=make_config("stdlib").data), eval={"split": "test"})
    with pytest.raises(UserError, match=r"eval.split='test' .*stage.name='sft'"):
        changed(config, eval={"split": "test"}, stage={"name": "sft"})
