from __future__ import annotations

import errno
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.base import artifacts
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config, from_config_dict, to_dict
from smallcoder_jax.data.corpus import collect, corpus
from smallcoder_jax.data.corpus.corpus import read_accounting, read_split
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.data.tokens import prepare, shards
from smallcoder_jax.data.tokens.statistics import format_report
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.data.conftest import code

MakeConfig = Callable[..., Config]


def with_sentencepiece(config: Config, vocab_size: int, path: str = "") -> Config:
    plain = to_dict(config)
    plain["model"]["vocab_size"] = vocab_size
    plain["tokenizer"] = {"kind": "sentencepiece", "path": path}
    return from_config_dict(plain)


def records(prepared: prepare.Prepared, split: str) -> list[np.ndarray]:
    manifest = prepared.manifest
    return [
        ids
        for source in manifest.sources
        for ids in shards.read_records(prepared.tokens_folder, getattr(source, split).files, manifest.dtype)
    ]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*") if path.name.startswith(".") or path.name.endswith(".partial")]


def test_every_document_is_stored_once_with_bos_and_eos(tree: Path, make_config: MakeConfig) -> None:
    prepared = prepare.prepare(make_config(f"dir:{tree}"))
    texts = []
    for ids in records(prepared, "train") + records(prepared, "validation"):
        assert (ids[0], ids[-1]) == (254, 255)
        texts.append(prepared.tokenizer.decode(ids.tolist()))
    assert sorted(texts) == sorted(code(number) for number in range(40))
    entry = prepared.manifest.sources[0]
    assert entry.train.documents + entry.validation.documents == 40
    assert entry.train.bytes + entry.validation.bytes == sum(len(code(number)) for number in range(40))
    assert not prepared.manifest.dummy
    assert (prepared.tokens_folder / prepared.manifest.tokenizer).resolve() == prepared.tokenizer_folder.resolve()
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("place", ["data", "src/data"])
def test_a_folder_does_not_read_what_was_prepared_in_it(tree: Path, make_config: MakeConfig, place: str) -> None:
    (tree / "src").mkdir()
    (tree / "src" / "own.py").write_text(code(1000))
    config = make_config(f"dir:{tree}", dir=str(tree / place))
    first = prepare.prepare(config)
    run = tree / "runs" / "one"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}\n")
    second = prepare.prepare(config)
    assert second.corpus_folder == first.corpus_folder
    assert second.accounting["sources"][0]["kept"] == 41
    for folder in (first.corpus_folder, first.tokens_folder):
        shutil.rmtree(folder)
    assert prepare.prepare(config).accounting["fingerprint"] == first.accounting["fingerprint"]


def test_a_source_as_data_folder_is_read_without_what_was_prepared(tree: Path, make_config: MakeConfig) -> None:
    config = make_config(f"dir:{tree}", dir=str(tree))
    first = prepare.prepare(config)
    assert prepare.prepare(config).corpus_folder == first.corpus_folder
    assert first.accounting["sources"][0]["kept"] == 40


@pytest.mark.parametrize("place", ["file", "file/data", "loop", "broken"])
def test_a_data_folder_that_cannot_be_made(tree: Path, make_config: MakeConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "file" / "nothing")
    with pytest.raises(UserError, match=r"cannot be made or written to.*data\.dir"):
        prepare.prepare(make_config(f"dir:{tree}", dir=str(tmp_path / place)))


def test_the_tokenizer_is_trained_on_every_source(tree: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(300):
        (other / f"{number}.txt").write_text(f"lemon tree number {number}, one of many in the garden of lemon trees\n")
    small = tmp_path / "small"
    small.mkdir()
    for number in range(5):
        (small / f"{number}.md").write_text(
            f"zebra {number}: a note about zebras that is long enough to be kept here\n"
        )
    folder = prepare.prepare(make_config(f"dir:{other},dir:{tree},dir:{small}")).corpus_folder
    size = 3000
    texts = list(corpus.training_texts(folder, size))
    sizes = {word: sum(len(text) for text in texts if word in text) for word in ("lemon", "zebra", "function")}
    whole = {entry["spec"]: entry["train"]["bytes"] for entry in read_accounting(folder)["sources"]}
    assert sizes["zebra"] == whole[f"dir:{small}"] < size / 3
    assert sizes["lemon"] == pytest.approx((size - sizes["zebra"]) / 2, abs=100)
    assert sizes["function"] == pytest.approx((size - sizes["zebra"]) / 2, abs=100)


def test_one_source_is_read_to_train_on_as_far_as_asked(tree: Path, make_config: MakeConfig) -> None:
    folder = prepare.prepare(make_config(f"dir:{tree}")).corpus_folder
    stored = [document.text for document in read_split(folder, "train")]
    assert list(corpus.training_texts(folder, 1)) == stored[:1]
    assert list(corpus.training_texts(folder, len(stored[0]) + 1)) == stored[:2]
    assert list(corpus.training_texts(folder, 1 << 20)) == stored


def test_the_same_documents_give_the_same_fingerprint_anywhere(tree: Path, make_config: MakeConfig) -> None:
    first = prepare.prepare(with_sentencepiece(make_config(f"dir:{tree}"), 330))
    copy = tree.parent / "copy"
    shutil.copytree(tree, copy)
    second = prepare.prepare(with_sentencepiece(make_config(f"dir:{copy}", dir=str(tree.parent / "other")), 330))
    assert second.manifest.fingerprint == first.manifest.fingerprint
    assert second.tokenizer.hash == first.tokenizer.hash
    assert second.tokens_folder != first.tokens_folder


def test_preparing_twice_does_the_work_once(
    tree: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_sentencepiece(make_config(f"dir:{tree}"), 330)
    first = prepare.prepare(config)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the work was done again")

    monkeypatch.setattr(corpus, "collect_source", refuse)
    monkeypatch.setattr(prepare, "train_sentencepiece", refuse)
    monkeypatch.setattr(shards, "write_tokens", refuse)
    assert prepare.prepare(config).manifest == first.manifest
    assert prepare.find_prepared(config).manifest == first.manifest


@pytest.mark.parametrize("change", [{"min_characters": 60}, {"validation_fraction": 0.3}, {"max_documents": 30}])
def test_other_settings_give_another_corpus(tree: Path, make_config: MakeConfig, change: dict[str, float]) -> None:
    one, other = make_config(f"dir:{tree}"), make_config(f"dir:{tree}", **change)
    assert prepare.prepare(one).corpus_folder != prepare.prepare(other).corpus_folder


def test_a_changed_file_gives_another_corpus(tree: Path, make_config: MakeConfig) -> None:
    config = make_config(f"dir:{tree}")
    before = prepare.prepare(config)
    (tree / "f00.py").write_text(code(100))
    after = prepare.prepare(config)
    assert after.manifest.fingerprint != before.manifest.fingerprint
    with pytest.raises(UserError, match="not prepared, or its sources changed"):
        prepare.find_prepared(make_config(f"dir:{tree}", min_characters=51))


def test_duplicates_are_dropped_across_sources_and_never_straddle(tree: Path, make_config: MakeConfig) -> None:
    copy = tree.parent / "copy"
    shutil.copytree(tree, copy)
    (copy / "own.py").write_text(code(1000))
    (tree / "again.py").write_text(code(3))
    prepared = prepare.prepare(make_config(f"dir:{tree},dir:{copy}@0.5!nofim"))
    first, second = prepared.accounting["sources"]
    assert (first["kept"], first["duplicates"]) == (40, 1)
    assert (second["kept"], second["duplicates"]) == (1, 40)
    train = {document.hash for document in read_split(prepared.corpus_folder, "train")}
    validation = {document.hash for document in read_split(prepared.corpus_folder, "validation")}
    assert not train & validation
    assert len(train) + len(validation) == 41
    entry = prepared.manifest.sources[1]
    assert (entry.weight, entry.fim, entry.train.documents + entry.validation.documents) == (0.5, False, 1)


def test_a_document_keeps_its_side_when_others_come_and_go(tree: Path, make_config: MakeConfig) -> None:
    def sides() -> dict[str, str]:
        folder = prepare.prepare(make_config(f"dir:{tree}")).corpus_folder
        return {document.text: split for split in SPLITS for document in read_split(folder, split)}

    before = sides()
    (tree / "f05.py").unlink()
    (tree / "a_new.py").write_text(code(500))
    after = sides()
    shared = before.keys() & after.keys()
    assert len(shared) == 39
    assert all(before[text] == after[text] for text in shared)
    assert set(before.values()) == set(SPLITS)


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.999])
def test_of_a_few_documents_at_least_one_is_on_each_side(
    tmp_path: Path, make_config: MakeConfig, count: int, fraction: float
) -> None:
    for draw in range(5):
        root = tmp_path / f"draw{draw}"
        root.mkdir()
        for number in range(count):
            (root / f"{number}.py").write_text(code(1000 * draw + number))
        folder = prepare.prepare_corpus(make_config(f"dir:{root}", validation_fraction=fraction))
        (source,) = read_accounting(folder)["sources"]
        documents = [source[split]["documents"] for split in SPLITS]
        assert sum(documents) == count
        assert min(documents) >= 1
        shutil.rmtree(folder)
        assert prepare.prepare_corpus(make_config(f"dir:{root}", validation_fraction=fraction)) == folder
        assert [read_accounting(folder)["sources"][0][split]["documents"] for split in SPLITS] == documents


def test_at_least_one_repository_is_held_out(tmp_path: Path, make_config: MakeConfig) -> None:
    root = tmp_path / "repositories"
    for number in range(40):
        folder = root / f"r{number // 2:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}.py").write_text(code(number))
    (source,) = read_accounting(prepare.prepare_corpus(make_config(f"dir:{root}", validation_fraction=1e-9)))["sources"]
    assert (source["split_by"], source["validation"]["documents"]) == ("repository", 2)


def test_line_ends_marks_and_trailing_spaces_make_no_other_document(tmp_path: Path, make_config: MakeConfig) -> None:
    root = tmp_path / "copies"
    root.mkdir()
    for number in range(30):
        text = code(number)
        copies = [
            text,
            text.replace("\n", "\r\n"),
            "\ufeff" + text,
            text.replace("\n", " \t\n"),
            text.rstrip(),
            text + "\n\n",
        ]
        copies.append(text.replace("\n", "\r"))
        for copy, content in enumerate(copies):
            (root / f"{number}-{copy}.py").write_bytes(content.encode())
    folder = prepare.prepare_corpus(make_config(f"dir:{root}"))
    (source,) = read_accounting(folder)["sources"]
    assert (source["kept"], source["duplicates"]) == (30, 180)

    def sides(copy: int) -> dict[int, str]:
        one = tmp_path / f"copy{copy}"
        one.mkdir()
        for number in range(30):
            shutil.copy(root / f"{number}-{copy}.py", one / f"{number}.py")
        folder = prepare.prepare_corpus(make_config(f"dir:{one}"))
        return {d.path: split for split in SPLITS for d in read_split(folder, split)}

    first = sides(0)
    assert all(sides(copy) == first for copy in range(1, 7))
    stored = {document.text for split in SPLITS for document in read_split(folder, split)}
    assert stored == {code(number) for number in range(30)}  # the first one, as it was


def test_what_was_left_out_is_listed(tree: Path, make_config: MakeConfig) -> None:
    for number in range(25):
        (tree / f"made{number:02d}.py").write_text("# Code generated by a tool.\n" + code(number))
    (tree / "again.py").write_text(code(3))
    (tree / "mean\x1b[2J.py").write_text("x = 1")
    (tree / ".gitignore").write_text("out/\n")
    (tree / "out").mkdir()
    prepared = prepare.prepare(make_config(f"dir:{tree}"))
    (examples,) = prepared.accounting["left_out"].values()
    assert examples == {
        "duplicate": ["f03.py"],
        "generated": [f"made{number:02d}.py" for number in range(collect.MAX_EXAMPLES)],
        "hidden": [".gitignore"],
        "ignored": ["out"],
        "short": ["mean\x1b[2J.py"],
    }
    lines = format_report(prepared.manifest).splitlines()
    assert lines[lines.index("  not kept:") + 1 :] == [
        "    short 1: mean\\x1b[2J.py",
        "    generated 25: made00.py, made01.py, made02.py, ...",
        "    duplicate 1: f03.py",
        "    hidden 1: .gitignore",
        "    ignored 1: out",
    ]


def test_repositories_stay_on_one_side(tmp_path: Path, make_config: MakeConfig) -> None:
    root = tmp_path / "repositories"
    for number in range(120):
        folder = root / f"r{number // 4:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}.py").write_text(code(number))
    prepared = prepare.prepare(make_config(f"dir:{root}"))
    assert prepared.accounting["sources"][0]["split_by"] == "repository"
    train, validation = (
        {document.repository for document in read_split(prepared.corpus_folder, split)} for split in SPLITS
    )
    assert not train & validation
    assert len(train) + len(validation) == 30
    assert min(len(train), len(validation)) > 0


def test_repository_order_makes_one_record_of_a_repository(tmp_path: Path, make_config: MakeConfig) -> None:
    root = tmp_path / "repositories"
    for number in range(25):
        folder = root / f"r{number:02d}"
        folder.mkdir(parents=True)
        (folder / "a.py").write_text(f"from z import f\n{code(number)}")
        (folder / "z.py").write_text(code(number + 1000))
    (root / "alone.py").write_text(code(5000))
    prepared = prepare.prepare(make_config(f"dir:{root}", repository_order=True))
    stored = records(prepared, "train") + records(prepared, "validation")
    assert len(stored) == 26
    specials = prepared.tokenizer.specials
    found = next(ids.tolist() for ids in stored if b"r07" in bytes(ids.astype(np.uint8)))
    text = [f"r07/z.py\n{code(1007)}", f"r07/a.py\nfrom z import f\n{code(7)}"]
    assert found == [
        254,
        specials[base.REPO_NAME],
        *b"r07",
        specials[base.FILE_SEP],
        *text[0].encode(),
        specials[base.FILE_SEP],
        *text[1].encode(),
        255,
    ]


def test_accounting_counts_everything(tree: Path, make_config: MakeConfig) -> None:
    (tree / "short.py").write_text("x = 1\n")
    (tree / "null.py").write_bytes(b"\0" * 100)
    (tree / "bad.py").write_bytes(b"# \xff\n" + code(50).encode())
    (tree / "made.py").write_text("# Generated by a tool. Do not edit.\n" + code(51))
    (tree / "flat.js").write_text("var a=1;" * 500)
    (tree / "vendor").mkdir()
    (tree / "vendor" / "lib.py").write_text(code(52))
    (tree / "twice.py").write_text(code(7))
    (tree / "picture.dat").write_text("not source")
    prepared = prepare.prepare(make_config(f"dir:{tree}"))
    (source,) = prepared.accounting["sources"]
    assert source["dropped"] == {"short": 1, "binary": 1, "minified": 1, "generated": 1, "vendored": 1}
    assert (source["read"], source["kept"], source["duplicates"], source["unreadable"]) == (47, 40, 1, 1)
    assert source["passed_over"] == {"not_source": 1}
    assert source["read"] == source["kept"] + sum(source["dropped"].values()) + 2
    assert source["statistics"]["languages"] == {"python": 40}
    assert read_accounting(prepared.corpus_folder)["fingerprint"] == prepared.accounting["fingerprint"]
    report = format_report(prepared.manifest)
    assert "unreadable" in report
    assert re.search(r"\nread +47\nkept +40\n", report)
    table = report.split("\n\n")[0].splitlines()
    assert max(map(len, table)) == len(f"source       dir:{tree}")
    assert "python 40" in report


def test_max_documents(tree: Path, make_config: MakeConfig) -> None:
    prepared = prepare.prepare(make_config(f"dir:{tree}", max_documents=25))
    assert prepared.accounting["sources"][0]["kept"] == 25


def test_bad_sources(tmp_path: Path, make_config: MakeConfig) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty: there is no document"):
        prepare.prepare(make_config(f"dir:{empty}"))
    (empty / "a.bin").write_bytes(b"\0\1")
    (empty / "b.py").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=r"no usable document.*binary 2"):
        prepare.prepare(make_config(f"dir:{empty}"))
    (empty / ".gitignore").write_text("*")
    with pytest.raises(UserError, match=r"no usable document.*ignored 2 \(a\.bin\).*read with dir:PATH\?ignored=keep"):
        prepare.prepare(make_config(f"dir:{empty}"))
    (empty / ".gitignore").unlink()
    with pytest.raises(UserError, match="does not exist"):
        prepare.prepare(make_config(f"dir:{tmp_path / 'nothing'}"))
    (empty / "one.py").write_text(code(1))
    with pytest.raises(UserError, match=r"split is empty.*validation_fraction"):
        prepare.prepare(make_config(f"dir:{empty}"))
    assert leftovers(tmp_path / "data") == []
    assert not list((tmp_path / "data").glob("*/*"))


def test_wrong_vocabulary(tree: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(f"dir:{tree}")
    own = tmp_path / "own"
    prepared = prepare.prepare(with_sentencepiece(config, 330))
    prepared.tokenizer.save(own)
    with pytest.raises(UserError, match=r"330 entries, but model.vocab_size=400"):
        prepare.prepare(with_sentencepiece(config, 400, str(own)))
    with pytest.raises(UserError, match=r"cannot be trained on this text.*--config\.model\.vocab_size=\d+"):
        prepare.prepare(with_sentencepiece(config, 60_000))
    assert leftovers(tmp_path / "data") == []


@pytest.mark.parametrize("where", ["given", "stored"])
def test_a_tokenizer_that_changed(tree: Path, make_config: MakeConfig, tmp_path: Path, where: str) -> None:
    own = tmp_path / "own"
    config = with_sentencepiece(make_config(f"dir:{tree}"), 330, str(own))
    prepare.prepare(with_sentencepiece(config, 330)).tokenizer.save(own)
    prepared = prepare.prepare(config)
    other = prepare.prepare(with_sentencepiece(make_config(f"dir:{tree}", max_documents=20), 330))
    other.tokenizer.save(own if where == "given" else prepared.tokenizer_folder)
    with pytest.raises(UserError, match="changed since the data was prepared"):
        prepare.prepare(config)


def test_full_disk_while_the_corpus_is_written(
    tree: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path, value: object) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    config = make_config(f"dir:{tree}")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_json", full)
        with pytest.raises(UserError, match=r"disk of .*data.corpus is full.*data\.dir"):
            prepare.prepare(config)
    assert list((tmp_path / "data" / "corpus").iterdir()) == []
    assert prepare.prepare(config).manifest.sources[0].train.documents > 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device")])
def test_a_full_disk_of_temporary_files_is_not_that_of_the_data(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {"temporary": True, "data": False}
    monkeypatch.setattr(artifacts.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(artifacts, "is_full", lambda folder: full[folder.name])
    with (
        pytest.raises(UserError, match=r"disk of .*temporary, where .*TMPDIR"),
        artifacts.full_disk_as_user_error(tmp_path / "data"),
    ):
        raise error
    full["data"] = True
    with (
        pytest.raises(UserError, match=r"disk of .*data is full .*data\.dir"),
        artifacts.full_disk_as_user_error(tmp_path / "data"),
    ):
        raise error
    monkeypatch.undo()
    assert not artifacts.is_full(tmp_path / "not" / "there")


def test_full_disk_while_tokens_are_written(
    tree: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class FullWriter:
        def __init__(self, path: str, options: str):
            self.path = path

        def write(self, record: bytes) -> None:
            raise RuntimeError(f"write() failed: No space left on device; writing {self.path}")

    config = make_config(f"dir:{tree}")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordWriter", FullWriter)
        with pytest.raises(UserError, match=r"disk of .*tokens is full"):
            prepare.prepare(config)
    assert list((tmp_path / "data" / "tokens").iterdir()) == []
    assert prepare.prepare(config).manifest.sources[0].train.documents > 0


def test_dummy_data_only_when_asked_and_marked(tmp_path: Path, make_config: MakeConfig) -> None:
    missing = f"dir:{tmp_path / 'nothing'}"
    with pytest.raises(UserError, match="does not exist"):
        prepare.prepare(make_config(missing))
    prepared = prepare.prepare(make_config(missing, allow_dummy_data=True))
    assert prepared.manifest.dummy
    assert "does not exist" in prepared.accounting["sources"][0]["dummy"]
    assert {document.source for document in read_split(prepared.corpus_folder, "train")} == {"dummy"}
    assert "DUMMY" in format_report(prepared.manifest)


def test_dummy_data_says_how_to_be_rid_of_it(
    tree: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(f"dir:{tree}", allow_dummy_data=True)

    def fail(*args: object) -> None:
        raise UserError("the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(collect, "read_source", fail)
        prepare.prepare(config)
    said = io.StringIO()
    dummy = prepare.prepare(config, Progress(said))
    assert dummy.manifest.dummy
    assert "the network is away" in said.getvalue()
    for folder in (dummy.corpus_folder, dummy.tokenizer_folder, dummy.tokens_folder):
        assert str(folder) in said.getvalue()
        shutil.rmtree(folder)
    assert not prepare.prepare(config).manifest.dummy


def test_dummy_data_is_not_used_where_the_source_can_be_read(tree: Path, make_config: MakeConfig) -> None:
    assert not prepare.prepare(make_config(f"dir:{tree}", allow_dummy_data=True)).manifest.dummy


def test_provenance_is_kept(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"content": code(n), "path": f"é{n}.py", "repo": "r", "license": "mit", "lang": "Python"} for n in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare.prepare(make_config(f"jsonl:{path}"))
    documents = [document for split in SPLITS for document in read_split(prepared.corpus_folder, split)]
    assert {document.path for document in documents} == {f"é{n}.py" for n in range(30)}
    assert {(d.source, d.repository, d.license, d.language) for d in documents} == {
        (f"jsonl:{path}", "r", "mit", "python")
    }
    assert prepared.accounting["sources"][0]["statistics"]["licenses"] == {"mit": 30}


def test_specials_written_in_a_text_stay_text(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = tmp_path / "hard"
    folder.mkdir()
    text = "</s><|fim_prefix|> <|im_end|>\r\n\t\u2581 \U0001f600 é" * 3
    for number in range(30):
        (folder / f"{number}.py").write_bytes(f"{text}{code(number)}".encode())
    prepared = prepare.prepare(with_sentencepiece(make_config(f"dir:{folder}"), 330))
    specials = set(prepared.tokenizer.specials.values())
    for ids in records(prepared, "train"):
        assert not specials & set(ids[1:-1].tolist())
        assert b"".join(prepared.tokenizer.token_bytes[i] for i in ids).decode().startswith(text)


def test_byte_tokenizer_hash_is_recorded(tree: Path, make_config: MakeConfig) -> None:
    assert prepare.prepare(make_config(f"dir:{tree}")).manifest.tokenizer_hash == ByteTokenizer().hash
