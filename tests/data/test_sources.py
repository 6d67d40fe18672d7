import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.documents import Document, Skipped
from smallcoder_jax.data.sources import parse_sources, read_source, source_identity
from tests.data.conftest import code

ELSEWHERE = Path("/nonexistent")  # where prepared data is kept: not among the sources


def read(spec: str) -> tuple[list[Document], list[tuple[str, str]]]:
    items = list(read_source(parse_sources(spec)[0], ELSEWHERE))
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [(item.reason, item.path) for item in items if isinstance(item, Skipped)]


def test_specs_with_weights_and_marks() -> None:
    stdlib, folder, hub = parse_sources("stdlib@0.5!nofim, dir:a/b@c@3 , hf:org/name?split=train&streaming=1@2e-1")
    assert (stdlib.kind, stdlib.weight, stdlib.fim) == ("stdlib", 0.5, False)
    assert (folder.location, folder.weight, folder.fim) == ("a/b@c", 3.0, True)
    assert (hub.location, dict(hub.options), hub.weight) == ("org/name", {"split": "train", "streaming": "1"}, 0.2)
    assert hub.text == "hf:org/name?split=train&streaming=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stdlb", "unknown kind of source 'stdlb'.*did you mean 'stdlib'"),
        ("", "empty source"),
        ("stdlib,,installed", "empty source"),
        ("sdtlib\nhere", "unknown kind of source"),
        ("stdlib@0", "positive number"),
        ("stdlib@x", "positive number"),
        ("dir:", "dir:PATH"),
        ("stdlib:here", "should read stdlib"),
        ("hf:a/b?splt=train", "unknown option 'splt'.*did you mean 'split'"),
        ("stdlib,stdlib@2", "names stdlib twice"),
    ],
)
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sources(text)


def test_a_newline_in_a_path_is_part_of_it() -> None:
    assert parse_sources("dir:a\nb@2")[0].location == "a\nb"


def test_stdlib_is_sorted_and_without_installed_packages() -> None:
    documents, _ = read("stdlib")
    paths = [document.path for document in documents]
    assert "json/decoder.py" in paths
    assert not any("site-packages" in path for path in paths)
    assert {(document.language, document.license, document.repository) for document in documents} == {
        ("python", "PSF-2.0", "")
    }
    assert [document.path for document in read("stdlib")[0]] == paths


def test_installed_packages_are_repositories() -> None:
    found: dict[str, Document] = {}
    for item in read_source(parse_sources("installed")[0], ELSEWHERE):
        if isinstance(item, Document):
            found.setdefault(item.repository, item)
        if "absl" in found and item.path > "b":
            break
    assert found["absl"].path.startswith("absl/")
    assert "Apache" in found["absl"].license


def test_folder_skips_and_counts_what_is_no_source(tree: Path) -> None:
    (tree / "program.bin").write_bytes(b"\x7fELF\0\0")
    (tree / "notes.xyz").write_text("no known kind")
    (tree / "null.py").write_bytes(b"a = '\0'\n")
    (tree / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (tree / ".hidden").mkdir()
    (tree / ".hidden" / "secret.py").write_text(code(99))
    outside = tree.parent / "outside.py"
    outside.write_text(code(98))
    (tree / "escape.py").symlink_to(outside)
    (tree / "broken.py").symlink_to(tree / "nothing.py")
    (tree / "inside.py").symlink_to(tree / "f00.py")
    (tree / "elsewhere").symlink_to(tree.parent)
    documents, skipped = read(f"dir:{tree}")
    assert len(documents) == 41
    assert {(reason, Path(path).name) for reason, path in skipped} == {
        ("binary", "program.bin"),
        ("not_source", "notes.xyz"),
        ("binary", "null.py"),
        ("unreadable", "latin.py"),
        ("hidden", ".hidden"),
        ("link", "escape.py"),
        ("unreadable", "broken.py"),
        ("link", "elsewhere"),
    }


def test_file_that_the_system_refuses_is_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "f07.py":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    documents, skipped = read(f"dir:{tree}")
    assert len(documents) == 39
    assert skipped == [("unreadable", "f07.py")]


def test_repositories_of_a_tree(tmp_path: Path) -> None:
    for path in ("one/a.py", "one/sub/b.rs", "two/.git/HEAD", "two/c.js", "top.py", "one/deep/three/.git/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    (tmp_path / "one/deep/three/d.c").write_text("x")
    documents, _ = read(f"dir:{tmp_path}")
    assert {document.path: (document.repository, document.language) for document in documents} == {
        "one/a.py": ("one", "python"),
        "one/sub/b.rs": ("one", "rust"),
        "two/c.js": ("two", "javascript"),
        "one/deep/three/d.c": ("one/deep/three", "c"),
        "top.py": ("", "python"),
    }


def test_a_clone_is_one_repository(tmp_path: Path) -> None:
    for path in ("clone/.git/HEAD", "clone/src/a.py", "clone/tests/b.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    assert {document.repository for document in read(f"dir:{tmp_path / 'clone'}")[0]} == {"clone"}


def test_missing_paths(tmp_path: Path, tree: Path) -> None:
    for spec in ("dir:{}/no", "jsonl:{}/no.jsonl", "parquet:{}/no.parquet"):
        with pytest.raises(UserError, match="does not exist"):
            read(spec.format(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        read(f"dir:{tree / 'f00.py'}")
    with pytest.raises(UserError, match=r"holds no \.jsonl file"):
        read(f"jsonl:{tree}")


def test_jsonl_with_provenance_and_bad_lines(tmp_path: Path) -> None:
    rows = [
        {"content": "a = 1", "path": "x/a.py", "repo": "r", "licenses": ["mit", "apache-2.0"], "id": 7},
        {"content": "b", "lang": "Go", "repo": "\ud800"},
        {"content": "\ud800"},
        {"content": None},
        {"content": "nul\0"},
        ["no object"],
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "{broken", ""]))
    documents, skipped = read(f"jsonl:{path}")
    assert documents == [
        Document("a = 1", f"jsonl:{path}", "x/a.py", "r", "python", "apache-2.0, mit"),
        Document("b", f"jsonl:{path}", "rows.jsonl:2", "\\ud800", "go", ""),
        Document("", f"jsonl:{path}", "rows.jsonl:4"),
    ]
    assert [reason for reason, _ in skipped] == ["unreadable", "binary", "unreadable", "unreadable"]
    assert [place for _, place in skipped] == [
        "rows.jsonl:3 (text that is not valid Unicode: surrogates not allowed)",
        "rows.jsonl:5",
        "rows.jsonl:6 (a JSON list and no object)",
        "rows.jsonl:7 (no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    ]


def test_a_line_nested_too_deep_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 200_000 + "\n" + json.dumps({"content": "a = 1"}) + "\n")
    documents, skipped = read(f"jsonl:{path}")
    assert [document.text for document in documents] == ["a = 1"]
    assert skipped == [("unreadable", "rows.jsonl:1 (no JSON: brackets nested too deep)")]


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "text": "t"}) + "\n")
    assert read(f"jsonl:{path}")[0][0].text == "t"
    assert read(f"jsonl:{path}?column=question+answer")[0][0].text == "q\n\na"
    with pytest.raises(UserError, match="The columns found are question, answer, text; expected column body"):
        read(f"jsonl:{path}?column=body")
    path.write_text(json.dumps({"body": "b"}) + "\n")
    with pytest.raises(UserError, match="columns found are body; expected one of the columns content, text, code"):
        read(f"jsonl:{path}")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"code": ["a = 1", "b = 2"], "path": ["a.py", "b.py"]}), path)
    assert [(d.text, d.path, d.language) for d in read(f"parquet:{path}")[0]] == [
        ("a = 1", "a.py", "python"),
        ("b = 2", "b.py", "python"),
    ]
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(f"parquet:{path}")


def test_hub_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(*args: object, **options: object) -> datasets.Dataset:
        calls.append((*args, options))
        return datasets.Dataset.from_list([{"content": "x = 1", "path": "p.py", "repository_name": "r"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (document,), _ = read("hf:the-stack-dedup?config=python")
    assert (document.text, document.repository, document.path) == ("x = 1", "r", "p.py")
    read("hf:own/name?config=c&split=test&column=path")
    assert calls == [
        ("bigcode/the-stack-dedup", None, {"data_dir": "data/python", "split": "train", "streaming": True}),
        ("own/name", "c", {"data_dir": None, "split": "test", "streaming": False}),
    ]


@pytest.mark.parametrize(("given", "streaming"), [("1", True), ("True", True), ("0", False), ("False", False)])
def test_streaming_is_on_or_off(monkeypatch: pytest.MonkeyPatch, given: str, streaming: bool) -> None:
    import datasets

    calls = []

    def load(*args: object, **options: object) -> datasets.Dataset:
        calls.append(options["streaming"])
        return datasets.Dataset.from_list([{"content": "x = 1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    read(f"hf:own/name?streaming={given}")
    assert calls == [streaming]
    with pytest.raises(UserError, match="streaming='no' is neither on nor off"):
        read("hf:own/name?streaming=no")


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("bad config"), FileNotFoundError("gone")])
def test_hub_source_without_a_network(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=f"{error}.*Three ways out.*jsonl:PATH.*HF_HOME.*HF_ENDPOINT.*sources=stdlib"):
        read("hf:bigcode/the-stack-smol")


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'smallcoder_jax\[hub\]'"):
        read("hf:bigcode/the-stack-smol")


def test_unknown_tfds_name() -> None:
    with pytest.raises(UserError, match=r"no_such_set.*Three ways out.*TFDS_DATA_DIR"):
        read("tfds:no_such_set")


def test_identity_follows_the_files(tree: Path) -> None:
    (spec,) = parse_sources(f"dir:{tree}")
    before = source_identity(spec, ELSEWHERE)
    assert source_identity(spec, ELSEWHERE) == before
    (tree / "f00.py").write_text(code(77) + "\n")
    assert source_identity(spec, ELSEWHERE) != before


def test_tfds_rows(tree: Path, make_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared corpus is itself a data set of TFDS: it is read back through the same door."""
    import tensorflow_datasets as tfds

    from smallcoder_jax.data.prepare import prepare

    prepared = prepare(make_config(f"dir:{tree}"))
    info = next(prepared.corpus_folder.glob("*/*/dataset_info.json"))
    builder = tfds.builder_from_directory(info.parent)
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: builder)
    documents, _ = read("tfds:code_corpus?split=train")
    assert len(documents) == prepared.manifest.sources[0].train.documents
    assert documents[0].path.endswith(".py")
