"""Encodings, byte order marks, and the cells of notebooks."""

from __future__ import annotations

import codecs
import json

import pytest

from smallcoder_jax.data.sources.decode import decode_source, notebook_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks(encoding: str) -> None:
    assert decode_source("x = 'é€'\r\n".encode(encoding)) == "x = 'é€'\r\n"
    assert decode_source(codecs.BOM_UTF16_BE + "é".encode("utf-16-be")) == "é"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("# -*- coding: latin-1 -*-\nx = 'é'\n", "latin-1"),
        ("#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\nx = '€'\n", "cp1252"),
        ("# encoding: euc-jp\nx = 'あ'\n", "euc-jp"),
        ("// -*- coding: koi8-r -*-\nx = 'Ж'\n", "koi8-r"),
        ('<?xml version="1.0" encoding="ISO-8859-15"?>\n<a>€</a>\n', "iso8859-15"),
        ("x = 1\n\n# coding: latin-1\ny = 'é'\n", "utf-8"),  # in the third line it declares nothing
        ("# Encoding: ASCII art é\n", "utf-8"),
        ("# coding: unicode_escape\nx = '\\x41'\n", "utf-8"),
        ("# coding: zlib\n", "utf-8"),
        ("# coding: none-such\n", "utf-8"),
    ],
)
def test_declarations(text: str, encoding: str) -> None:
    assert decode_source(text.encode(encoding)) == text


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\xd8", b"x = '\xe9'\n", b"# coding: utf-8\n\xe9", b"\xef\xbb\xbf\xe9"]
)
def test_what_is_no_text(content: bytes) -> None:
    with pytest.raises(ValueError, match="decode"):
        decode_source(content)


def notebook(cells: list[dict], **metadata: object) -> str:
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def test_a_notebook_is_its_cells_without_outputs() -> None:
    text, language = notebook_text(
        notebook(
            [
                {"cell_type": "markdown", "source": ["# Title\n", "\n", "Words."]},
                {"cell_type": "code", "source": ["x = 1\n", "print(x)"], "outputs": [{"text": "secret"}]},
                {"cell_type": "code", "source": "", "outputs": []},
                {"cell_type": "raw", "source": "raw"},
                {"cell_type": "code", "source": "y = 2\n"},
            ],
            kernelspec={"language": "python"},
        )
    )
    assert language == "python"
    assert text == "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\nprint(x)\n\n# %%\ny = 2\n"


def test_notebooks_of_other_languages_and_formats() -> None:
    cell = {"cell_type": "code", "source": "let x = 1;"}
    assert notebook_text(notebook([cell], language_info={"name": "Rust"})) == ("// %%\nlet x = 1;\n", "rust")
    old = {"worksheets": [{"cells": [{"cell_type": "code", "input": ["x = 1"], "outputs": []}]}], "nbformat": 3}
    assert notebook_text(json.dumps(old)) == ("# %%\nx = 1\n", "python")
    assert notebook_text(notebook([])) == ("", "python")


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", "{", "[" * 100_000, notebook([{"source": "\ud800"}])])
def test_what_is_no_notebook(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  any: a UnicodeError and what JSON says are among them
        notebook_text(text)
