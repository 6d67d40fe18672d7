"""The tools over prepared data: each kind of damage is found."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.sources import document
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.data.tokens import prepare, shards
from smallcoder_jax.data.tokens.validate import validate
from tests.data.conftest import code
from tools import prepare_data, train_tokenizer, validate_data


@pytest.fixture
def arguments(tree: Path, tmp_path: Path) -> list[str]:
    """Command-line arguments of a small config."""
    config = tmp_path / "config.py"
    config.write_text(
        "from smallcoder_jax.config import default_config\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.vocab_size = 256\n"
        "    config.tokenizer.kind = 'bytes'\n"
        f"    config.data.sources = 'dir:{tree}'\n"
        f"    config.data.dir = '{tmp_path / 'data'}'\n"
        "    config.data.validation_fraction = 0.2\n"
        "    return config\n"
    )
    return [f"--config={config}"]


def test_prepare_and_validate(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prepare_data.main(arguments)
    output = capsys.readouterr()
    assert "bytes/token" in output.out
    assert "python 40" in output.out
    assert "tokenising: [####" in output.err
    validate_data.main([*arguments, "--all"])
    output = capsys.readouterr()
    assert "ids back to text, 40 documents: ok" in output.out
    assert "valid: fingerprint" in output.out


def test_validate_needs_prepared_data(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"not prepared.*prepare_data"):
        validate_data.main(arguments)


def test_repository_order_validates(arguments: list[str], tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tree / f"r{number}").mkdir()
        (tree / f"r{number}" / "a.py").write_text(code(number + 100))
        (tree / f"r{number}" / "b.py").write_text(code(number + 200))
    overridden = [*arguments, "--config.data.repository_order=True"]
    prepare_data.main(overridden)
    validate_data.main([*overridden, "--all"])
    assert "valid: fingerprint" in capsys.readouterr().out


def _files(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "data").glob(pattern))


def test_flipped_bits_are_found(arguments: list[str], tmp_path: Path) -> None:
    prepare_data.main(arguments)
    (tokens,) = _files(tmp_path, "tokens/*/*train*.array_record")
    (corpus,) = _files(tmp_path, "corpus/*/*/*/*train*.array_record*")
    stored = tokens.read_bytes()
    place = stored.index(np.frombuffer(b"return", np.uint8).astype("<u2").tobytes())
    filled = [i for i, byte in enumerate(corpus.read_bytes()) if byte]  # the rest is padding between blocks
    for path, where in ((tokens, place), (corpus, filled[len(filled) // 3]), (corpus, filled[len(filled) // 2])):
        good = path.read_bytes()
        path.write_bytes(good[:where] + bytes([good[where] ^ 1]) + good[where + 1 :])
        with pytest.raises(CheckFailed):
            validate_data.main([*arguments, "--all"])
        path.write_bytes(good)
    validate_data.main([*arguments, "--all"])


def test_changed_records_are_found(arguments: list[str], tmp_path: Path) -> None:
    prepare_data.main(arguments)
    (manifest_path,) = _files(tmp_path, "tokens/*/manifest.json")
    good = manifest_path.read_text()
    plain = json.loads(good)
    plain["sources"][0]["train"]["tokens"] += 1
    manifest_path.write_text(json.dumps(plain))
    with pytest.raises(CheckFailed, match="recorded"):
        validate_data.main(arguments)
    manifest_path.write_text(good.replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(CheckFailed, match="fingerprint is"):
        validate_data.main(arguments)
    manifest_path.write_text(good)
    (accounting_path,) = _files(tmp_path, "corpus/*/accounting.json")
    plain = json.loads(accounting_path.read_text())
    plain["fingerprint"] = "0" * 64
    accounting_path.write_text(json.dumps(plain))
    with pytest.raises(CheckFailed, match="corpus's fingerprint"):
        validate_data.main(arguments)


def test_a_text_that_is_there_with_other_line_ends_is_found(
    arguments: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(tree.iterdir()):
        path.with_name(f"crlf_{path.name}").write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with monkeypatch.context() as patch:
        patch.setattr(document, "normalized", lambda text: text)
        prepare_data.main(arguments)
    with pytest.raises(CheckFailed, match="the same text is in"):
        validate_data.main(arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dummy": True}, "says dummy=True"),
        ({"accounting": "fingerprint"}, "accounting says fingerprint='other'"),
        ({"bytes": 1}, "bytes; recorded"),
        ({"lost": True}, "fewer records"),
    ],
)
def test_a_manifest_that_was_tampered_with(
    tree: Path, make_config, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    prepared = prepare.prepare(make_config(f"dir:{tree}"))
    manifest, folder = prepared.manifest, prepared.tokens_folder
    (source,) = manifest.sources
    if "dummy" in changes:
        manifest = dataclasses.replace(manifest, dummy=True)
    if "accounting" in changes:
        manifest = dataclasses.replace(manifest, accounting={**manifest.accounting, "fingerprint": "other"})
    if "bytes" in changes:
        split = dataclasses.replace(source.train, bytes=source.train.bytes + 1)
        manifest = dataclasses.replace(manifest, sources=(dataclasses.replace(source, train=split),))
    if "lost" in changes:  # every record but the last, with counts and fingerprint that agree
        stored = {
            name: [
                (ids, len(ids) - 2) for ids in shards.read_records(folder, getattr(source, name).files, manifest.dtype)
            ]
            for name in SPLITS
        }
        folder = tmp_path / "lost"
        written = shards.SourceTokens(
            source.spec, source.weight, source.fim, stored["train"][:-1], stored["validation"]
        )
        manifest = shards.write_tokens(
            folder,
            [written],
            vocab_size=manifest.vocab_size,
            tokenizer_hash=manifest.tokenizer_hash,
            tokenizer=manifest.tokenizer,
            accounting=lambda entries: prepared.manifest.accounting,
        )
    problems = validate(dataclasses.replace(prepared, manifest=manifest, tokens_folder=folder), 1.0, lambda line: None)
    assert len(problems) == 1
    assert message in problems[0]


def test_documents_that_the_accounting_leaves_out(arguments: list[str], tmp_path: Path) -> None:
    prepare_data.main(arguments)
    (path,) = _files(tmp_path, "corpus/*/accounting.json")
    plain = json.loads(path.read_text())
    plain["sources"][0]["train"]["documents"] -= 1
    path.write_text(json.dumps(plain))
    with pytest.raises(CheckFailed, match=r"train: .* documents are stored"):
        validate_data.main(arguments)


@pytest.mark.parametrize("damage", ["dataset_info", "accounting", "manifest"])
def test_damaged_records_are_one_message(arguments: list[str], tmp_path: Path, damage: str) -> None:
    prepare_data.main(arguments)
    if damage == "dataset_info":
        (path,) = _files(tmp_path, "corpus/*/*/*/dataset_info.json")
        path.write_text(path.read_text()[:-20])
    else:
        name, key = ("corpus/*/accounting", "fingerprint") if damage == "accounting" else ("tokens/*/manifest", "")
        (path,) = _files(tmp_path, f"{name}.json")
        plain = json.loads(path.read_text())
        del (plain if key else plain["accounting"])[key or "repository_order"]
        path.write_text(json.dumps(plain))
    said = {
        "dataset_info": "the corpus in .* is damaged",
        "accounting": r"accounting\.json has another form",
        "manifest": "does not say whether documents are in repository order",
    }
    with pytest.raises(CheckFailed, match=said[damage]):
        validate_data.main(arguments)


def test_the_line_to_check_data_can_be_pasted(
    arguments: list[str], tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spaced = tree.rename(tree.parent / "my tree; x")
    overrides = [f"--config.data.sources=dir:{spaced}"]
    prepare_data.main([*arguments, *overrides])
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line.partition("check it:")[2]) == [
        "python",
        "-m",
        "tools.validate_data",
        *arguments,
        *overrides,
    ]


def test_ids_of_another_text_are_found(tree: Path, make_config) -> None:
    prepared = prepare.prepare(make_config(f"dir:{tree}"))
    other = prepare.prepare(make_config(f"dir:{tree}", min_characters=51))
    folder = prepared.tokens_folder.parent / "wrong"
    text = "x" * 80
    documents = [([254, *text.encode(), 255], 80)] * prepared.manifest.sources[0].train.documents
    source = shards.SourceTokens("s", 1.0, True, documents, [])
    manifest = shards.write_tokens(folder, [source], vocab_size=256, tokenizer_hash="h", tokenizer="t")
    entry = dataclasses.replace(manifest.sources[0], spec=other.manifest.sources[0].spec)
    manifest = dataclasses.replace(manifest, sources=(entry,), accounting={"repository_order": False})
    lines: list[str] = []
    problems = validate(dataclasses.replace(prepared, manifest=manifest, tokens_folder=folder), 1.0, lines.append)
    assert any("other bytes than the text, from byte 0" in problem for problem in problems)
    assert len(lines) == 3


def test_train_tokenizer(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40, 200):
        (tree / f"f{number}.py").write_text(code(number))
    output = tmp_path / "tokenizer"
    arguments = [f"--sources=dir:{tree}", "--vocab-size=330", f"--output={output}", f"--data-dir={tmp_path / 'data'}"]
    train_tokenizer.main(arguments)
    assert "bytes per token:" in capsys.readouterr().out
    assert (output / "tokenizer.model").is_file()
    with pytest.raises(UserError, match="not empty"):
        train_tokenizer.main(arguments)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    plain, terminal = io.StringIO(), _Terminal()
    for stream in (plain, terminal):
        progress = Progress(stream)
        progress.start("tokenising", total_bytes=4_000_000)
        for _ in range(4):
            progress.add(1_000_000)
        progress.finish()
    assert "\r" not in plain.getvalue()
    assert terminal.getvalue().count("\r") == 5
    assert terminal.getvalue().count("\n") == 1
    for stream in (plain, terminal):
        assert "tokenising: [########################] 100% 4 documents, 4.0 MB" in stream.getvalue()
