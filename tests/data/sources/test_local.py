"""Folders of source code: what is read, what is passed over and counted, and what a file belongs to."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_regular
from smallcoder_jax.data.sources import local
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.spec import parse_sources, read_source, source_identity
from tests.data.conftest import code
from tests.data.sources.test_licenses import MIT

ELSEWHERE = Path("/nonexistent")  # where prepared data is kept: not among the sources


def read(spec: str) -> tuple[list[Document], list[tuple[str, str]]]:
    items = list(read_source(parse_sources(spec)[0], ELSEWHERE))
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [(item.reason, item.path) for item in items if isinstance(item, Skipped)]


def identity(folder: Path) -> str:
    return source_identity(parse_sources(f"dir:{folder}")[0], ELSEWHERE)


def fill(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


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
    def refuse(path: Path, limit: int) -> bytes:
        if path.name == "f07.py":
            raise PermissionError(13, "Permission denied")
        return read_regular(path, limit)

    monkeypatch.setattr(local, "read_regular", refuse)
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


def test_ignored_files_are_left_out_and_counted(tmp_path: Path) -> None:
    files = dict.fromkeys(("keep.py", "out/a.py", "src/b.py", "src/made.py", "src/own.py", "src/deep/made.py"), "x")
    ignore = {".gitignore": "out/\nmade.py\n", "src/.gitignore": "!/made.py\nown.py\n"}
    locks = dict.fromkeys(("package-lock.json", "Cargo.lock", "sub/pnpm-lock.yaml", "go.sum"), "{}")
    fill(tmp_path, {**files, **ignore, **locks, "big.py": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"})
    documents, skipped = read(f"dir:{tmp_path}")
    assert {document.path for document in documents} == {"keep.py", "src/b.py", "src/made.py"}
    assert {item for item in skipped if item[0] != "hidden"} == {
        ("ignored", "out"),
        ("ignored", "src/own.py"),
        ("ignored", "src/deep/made.py"),
        *(("lock_file", name) for name in locks),
        ("lfs_pointer", "big.py"),
    }
    documents, skipped = read(f"dir:{tmp_path}?ignored=keep")
    assert {document.path for document in documents} == {*files, "package-lock.json", "sub/pnpm-lock.yaml"}
    assert {reason for reason, _ in skipped} == {"hidden", "not_source", "lfs_pointer"}
    with pytest.raises(UserError, match="ignored='no' is unknown; give ignored=keep"):
        read(f"dir:{tmp_path}?ignored=no")


def test_rules_and_licence_of_the_repository_that_a_folder_lies_in(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    fill(clone, {"src/a.py": "x", "src/made.py": "x", "src/mine.py": "x", ".gitignore": "made.py\n/src/*.tmp\n"})
    fill(clone, {".git/info/exclude": "mine.py\n", "LICENSE": MIT, "other/.git/HEAD": "", "other/made.py": "x"})
    documents, _ = read(f"dir:{clone / 'src'}")
    assert [(document.path, document.license) for document in documents] == [("a.py", "MIT")]
    documents, _ = read(f"dir:{clone}")  # a clone within it has rules and a licence of its own
    assert {document.path: document.license for document in documents} == {"src/a.py": "MIT", "other/made.py": ""}


def test_the_nearest_licence_counts(tmp_path: Path) -> None:
    own = {"one/LICENSE.md": "# Our licence\n", "two/COPYING": MIT, "two/sub/LICENSE": "Other terms\n"}
    fill(tmp_path, {**own, "one/a.py": "x", "two/b.py": "x", "two/sub/deep/c.py": "x", "d.py": "x"})
    documents, _ = read(f"dir:{tmp_path}")
    assert {document.path: document.license for document in documents} == {
        "one/LICENSE.md": "Our licence",
        "one/a.py": "Our licence",
        "two/b.py": "MIT",
        "two/sub/deep/c.py": "Other terms",
        "d.py": "",
    }


def test_scripts_and_notebooks_are_documents(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": ["x = 1"], "outputs": [{"text": "no"}]}]
    fill(tmp_path, {"run": "#!/usr/bin/env python3\nx = 1\n", "notes": "words", "bad.ipynb": "{"})
    fill(tmp_path, {"work.ipynb": json.dumps({"cells": cells}), "x.sh.backup": "#!/bin/sh\n"})
    documents, skipped = read(f"dir:{tmp_path}")
    assert {document.path: (document.language, document.text) for document in documents} == {
        "run": ("python", "#!/usr/bin/env python3\nx = 1\n"),
        "work.ipynb": ("python", "# %%\nx = 1\n"),
    }
    assert skipped == [("unreadable", "bad.ipynb"), ("not_source", "notes"), ("not_source", "x.sh.backup")]


def test_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("x = 'é'\n".encode("utf-16"))
    (tmp_path / "b.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "c.py").write_bytes("\ufeffx = 'é'\n".encode())
    assert [document.text for document in read(f"dir:{tmp_path}")[0]] == [
        "x = 'é'\n",
        "# coding: latin-1\nx = 'é'\n",
        "x = 'é'\n",
    ]


def test_what_is_no_file_and_what_is_too_large(tmp_path: Path, tree: Path) -> None:
    os.mkfifo(tree / "pipe.py")
    os.mkfifo(tree / ".gitignore")
    os.mkfifo(tree / "LICENSE")
    (tree / "device.py").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tree / "s.py"))
    with (tree / "dump.sql").open("wb") as file:
        file.truncate(3 << 30)
    with (tree / "line.json").open("wb") as file:
        file.truncate(300 << 20)
    documents, skipped = read(f"dir:{tree}")
    assert len(documents) == 40
    assert {item for item in skipped if item[0] != "hidden"} == {
        ("unreadable", "pipe.py"),
        ("unreadable", "LICENSE"),
        ("unreadable", "s.py"),
        ("link", "device.py"),
        ("too_large", "dump.sql"),
        ("too_large", "line.json"),
    }


def test_a_huge_file_is_not_read_into_memory(tree: Path) -> None:
    with (tree / "dump.sql").open("wb") as file:
        file.truncate(3 << 30)
    with (tree / "data").open("wb") as file:  # without an extension: it may be a script
        file.truncate(3 << 30)
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from smallcoder_jax.data.sources.spec import parse_sources, read_source\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({1 << 30}, {1 << 30}))\n"
        "print(len(list(read_source(parse_sources(sys.argv[1])[0], Path('/nonexistent')))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, f"dir:{tree}"], capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr


@pytest.fixture
def deep_tree(tmp_path: Path) -> Iterator[Path]:
    """A file below more folders than Python recurses, and one below it with a path longer than the system takes."""
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for name, count, file in (("d", 1010, "a.py"), ("d" * 250, 10, "b.py")):
            for _ in range(count):
                os.mkdir(name)
                os.chdir(name)
            Path(file).write_text("x")
    finally:
        os.chdir(here)
    yield tmp_path
    subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)  # shutil.rmtree, which pytest uses, is recursive


def test_a_tree_of_any_depth(deep_tree: Path) -> None:
    documents, skipped = read(f"dir:{deep_tree}")
    assert [document.path.rpartition("/")[2] for document in documents] == ["a.py"]
    assert [reason for reason, _ in skipped] == ["unreadable"]
    assert identity(deep_tree)


@pytest.mark.parametrize("path", ["/" + "d/" * 5000, "/" + "n" * 300, "a\0b", "~no-such-user/x"])
def test_a_path_that_the_system_refuses(path: str) -> None:
    assert source_identity(parse_sources(f"dir:{path}")[0], ELSEWHERE)
    with pytest.raises(UserError, match=r"cannot be listed|does not exist"):
        read(f"dir:{path}")


def test_a_folder_that_cannot_be_listed_is_counted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "secret").mkdir()
    before = identity(tree)
    real = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    documents, skipped = read(f"dir:{tree}")
    assert (len(documents), skipped) == (40, [("unreadable", "secret")])
    assert identity(tree) == before


@contextlib.contextmanager
def without_privileges(tree: Path) -> Iterator[None]:
    """As another user than root, to whom no right is denied."""
    user = os.geteuid()
    if user == 0:
        for folder in (tree, *tree.parents[:-2]):
            folder.chmod(folder.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_without_rights(tree: Path) -> None:
    (tree / "secret" / "sub").mkdir(parents=True)
    (tree / "secret").chmod(0)
    with without_privileges(tree):
        documents, skipped = read(f"dir:{tree}")
        hashed = identity(tree)
    assert (len(documents), skipped) == (40, [("unreadable", "secret")])
    (tree / "secret").chmod(0o700)
    (tree / "secret").rename(tree.parent / "gone")
    assert hashed == identity(tree)


def test_the_content_of_a_folder_without_the_right_to_enter(tree: Path) -> None:
    """Its names can be listed, but nothing in it can be looked at."""
    (tree / "secret" / "run").mkdir(parents=True)
    (tree / "secret" / "a.py").write_text(code(1))
    (tree / "secret").chmod(0o644)
    with without_privileges(tree):
        documents, skipped = read(f"dir:{tree}")
        assert identity(tree)
    (tree / "secret").chmod(0o700)
    assert len(documents) == 40
    assert set(skipped) == {("unreadable", "secret/a.py"), ("unreadable", "secret/run")}


def test_a_loop_of_links_is_a_link(tree: Path) -> None:
    (tree / "loop").symlink_to("loop")
    (tree / "up").symlink_to("..")
    documents, skipped = read(f"dir:{tree}")
    assert len(documents) == 40
    assert set(skipped) == {("link", "loop"), ("link", "up")}


def test_identity_is_that_of_what_is_read(tree: Path) -> None:
    fill(tree, {"run": "#!/bin/sh\necho 1\n", ".gitignore": "out.py\n"})
    first = identity(tree)
    fill(tree, {"train.log": "1\n", "nohup": "1\n", "out.py": "x = 1\n", "yarn.lock": "x", ".hidden.py": "x"})
    with (tree / "dump.sql").open("wb") as file:
        file.truncate(3 << 30)
    assert identity(tree) == first
    seen = {first}
    for path, text in (
        ("f00.py", code(77)),
        ("run", "#!/bin/sh\necho 22\n"),
        (".gitignore", "#\n"),
        ("LICENSE", MIT),
        ("sub/new.py", "x"),
        ("sub/.git/HEAD", ""),
    ):
        fill(tree, {path: text})
        seen.add(identity(tree))
    assert len(seen) == 7
