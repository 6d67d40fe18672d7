"""Prose from packages: docstrings as Python has them, pages, and nothing of the standard library."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest

from smallcoder_jax.data.sources import local
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.prose import docstrings, read_prose


def parsed(code: str) -> list[str]:
    """The docstrings of several lines as Python itself finds them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted(
        (n for n in ast.walk(ast.parse(code)) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0)
    )
    found = (inspect.cleandoc(ast.get_docstring(node, clean=False) or "") for node in nodes)
    return [text for text in found if "\n" in text]


@pytest.mark.parametrize("module", [argparse, json, inspect])
def test_docstrings_are_those_that_python_finds(module: ModuleType) -> None:
    code = inspect.getsource(module)
    assert len(parsed(code)) > 3
    assert docstrings(code) == "\n\n".join(parsed(code))


def test_other_strings_are_no_docstrings() -> None:
    code = 'x = """not\nthis"""\n\n\ndef f():  # says:\n    r\'\'\'This\n    one.\'\'\'\n    y = """nor\nthat"""\n'
    assert docstrings(code) == "This\none."


def test_pages_descriptions_and_docstrings_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "good", tmp_path / "good-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "code.py").write_text('"""Adds.\n\nAnd more."""\n')
    (package / "plain.py").write_text("x = 1\n")
    (package / "guide.md").write_text("# Guide\n")
    (package / "broken.py").write_bytes(b'"""\xff"""')
    (info / "METADATA").write_text("Name: good\n\nWhat it is for.\n")
    (info / "RECORD").write_text("code.py\n")
    monkeypatch.setattr(local, "_package_roots", lambda: [tmp_path])
    found = list(read_prose("prose"))
    documents = {item.path: item for item in found if isinstance(item, Document)}
    assert {path: item.text for path, item in documents.items()} == {
        "good/code.py": "Adds.\n\nAnd more.",
        "good/guide.md": "# Guide\n",
        "good-1.0.dist-info/METADATA": "What it is for.\n",
    }
    assert {item.repository for item in documents.values()} == {"good"}
    assert [item.path for item in found if isinstance(item, Skipped)] == ["good/broken.py"]


def test_this_environment_has_prose() -> None:
    found = list(itertools.islice(read_prose("prose"), 20))
    assert sum(len(item.text) for item in found if isinstance(item, Document)) > 10_000
