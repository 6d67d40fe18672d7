import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.sources import local
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.spec import parse_sources, read_source, source_identity
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
        ("stdlib@1/2", "unknown kind"),
        ("dir:a@x", 'positive number after @; a path .* can be quoted: dir:"PATH"'),
        ("jsonl:a?colum=b", "unknown option 'colum'.*did you mean 'column'.*can be quoted"),
        ('dir:"a"b', "continues after the quoted path with 'b'"),
        ('dir:""', "dir:PATH"),
        ("/my/code", "a path needs its kind before it: did you mean 'dir:/my/code'"),
        ("stdlib,./rows.jsonl@2", "did you mean 'jsonl:./rows.jsonl@2'"),
        ("~/rows.jsonl.gz", "did you mean 'jsonl:~/rows.jsonl.gz'"),
        ("data/rows.parquet", "did you mean 'parquet:data/rows.parquet'"),
    ],
)
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sources(text)


def test_a_newline_in_a_path_is_part_of_it() -> None:
    assert parse_sources("dir:a\nb@2")[0].location == "a\nb"


NAMES = [
    "jane@corp",
    "a, b",
    "a,b@2",
    "what?",
    "x?ignored=keep",
    "so!nofim",
    "2 @ 3!nofim",
    "a,,b",
    'say "x"',
    "@",
    "?",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dir", "jsonl", "parquet"])
def test_what_exists_as_it_is_written_is_a_path(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).mkdir()
    path = str(tmp_path / name)
    others = parse_sources(f"stdlib,{kind}:{path},installed@2")
    assert [spec.kind for spec in others] == ["stdlib", kind, "installed"]
    (spec,) = parse_sources(f"{kind}:{path}")
    assert (spec.location, spec.options, spec.weight, spec.fim) == (path, (), 1.0, True)
    (spec,) = parse_sources(f"{kind}:{path}@0.5!nofim")
    assert (spec.location, spec.options, spec.weight, spec.fim) == (path, (), 0.5, False)
    option = "ignored=keep" if kind == "dir" else "column=a+b"
    (spec,) = parse_sources(f"{kind}:{path}?{option}@3")
    assert (spec.location, spec.options, spec.weight) == (path, (tuple(option.split("=")),), 3.0)
    assert parse_sources(spec.text)[0].location == path


@pytest.mark.parametrize("name", [name for name in NAMES if '"' not in name])
def test_a_quoted_path_is_a_path(name: str) -> None:
    stdlib, spec, other = parse_sources(f'stdlib, dir:"gone/{name}"?ignored=keep@2!nofim , installed')
    assert (stdlib.kind, other.kind) == ("stdlib", "installed")
    assert (spec.location, dict(spec.options), spec.weight, spec.fim) == (
        f"gone/{name}",
        {"ignored": "keep"},
        2.0,
        False,
    )
    assert parse_sources(spec.text)[0] == dataclasses.replace(spec, weight=1.0, fim=True)


def test_a_path_that_does_not_exist_is_named_whole() -> None:
    for location in ("/home/jane@corp/x", "/a/what?/b", "/a/!x"):
        with pytest.raises(UserError, match=f"{re.escape(location)}.* does not exist"):
            read(f"dir:{location}")


def test_every_source_is_looked_for_before_one_is_read(tree: Path, make_config: Callable, tmp_path: Path) -> None:
    from smallcoder_jax.data.tokens.prepare import prepare_corpus

    said = io.StringIO()
    for spec in (f"dir:{tmp_path}/no", f"jsonl:{tmp_path}/no.jsonl", f"parquet:{tmp_path}/no", f"dir:{tree}/f00.py"):
        with pytest.raises(UserError, match=r"does not exist|is not a folder"):
            prepare_corpus(make_config(f"dir:{tree},{spec}"), Progress(said))
    assert said.getvalue() == ""


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


def test_identity_of_stdlib_and_packages_is_that_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_package_roots", lambda: [tmp_path])
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text(code(1))
    installed, prose = parse_sources("installed,prose")
    first = [source_identity(spec, ELSEWHERE) for spec in (installed, prose)]
    (tmp_path / "package" / "cache.bin").write_text("grows")
    assert [source_identity(spec, ELSEWHERE) for spec in (installed, prose)] == first
    (tmp_path / "package" / "guide.md").write_text("# Guide")
    assert source_identity(installed, ELSEWHERE) == first[0]
    assert source_identity(prose, ELSEWHERE) != first[1]


def test_tfds_rows(tree: Path, make_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared corpus is itself a data set of TFDS: it is read back through the same door."""
    import tensorflow_datasets as tfds

    from smallcoder_jax.data.tokens.prepare import prepare

    prepared = prepare(make_config(f"dir:{tree}"))
    info = next(prepared.corpus_folder.glob("*/*/dataset_info.json"))
    builder = tfds.builder_from_directory(info.parent)
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: builder)
    documents, _ = read("tfds:code_corpus?split=train")
    assert len(documents) == prepared.manifest.sources[0].train.documents
    assert documents[0].path.endswith(".py")
