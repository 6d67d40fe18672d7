"""Languages by name and by the first line of a script."""

import pytest

from smallcoder_jax.data.sources.languages import CODE, language_of, language_of_script


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("a/b.py", "python"),
        ("gui.pyw", "python"),
        ("a.mts", "typescript"),
        ("a.cts", "typescript"),
        ("App.vue", "vue"),
        ("App.svelte", "svelte"),
        ("main.tf", "hcl"),
        ("setup.cfg", "ini"),
        ("work.ipynb", "jupyter-notebook"),
        ("Makefile", "makefile"),
        ("rules.mk", "makefile"),
        ("Dockerfile", "dockerfile"),
        ("Dockerfile.dev", "dockerfile"),
        ("dev.Dockerfile", "dockerfile"),
        ("Containerfile", "dockerfile"),
        ("Justfile", "just"),
        ("go.mod", "go-module"),
        ("Jenkinsfile", "groovy"),
        ("build.gradle.kts", "kotlin"),
        ("BUILD.bazel", "starlark"),
        ("Gemfile", "ruby"),
        ("README", "text"),
        ("Makefile.py", "python"),
        ("Dockerfile/notes", None),
        ("LICENSE", None),
        ("run", None),
        ("a.o", None),
        ("archive.tar.gz", None),
        (".py/x", None),
        ("", None),
    ],
)
def test_by_name(name: str, language: str | None) -> None:
    assert language_of(name) == language


@pytest.mark.parametrize(
    ("line", "language"),
    [
        ("#!/bin/sh", "shell"),
        ("#!/bin/bash -e\r", "shell"),
        ("#!/usr/bin/env python3", "python"),
        ("#!/usr/bin/python3.11 -u", "python"),
        ("#! /usr/bin/env -S A=1 uv run --script", "python"),
        ("#!/usr/bin/env -S deno run -A", "typescript"),
        ("#!/usr/bin/node", "javascript"),
        ("#!/usr/bin/perl -w", "perl"),
        ("#!/usr/bin/env Rscript", "r"),
        ("#!/opt/own/thing", None),
        ("#!/usr/bin/env", None),
        ("#!", None),
        ("# !/bin/sh", None),
        ("", None),
        ("#!\xff\xfe", None),
    ],
)
def test_by_first_line(line: str, language: str | None) -> None:
    assert language_of_script(f"{line}\nx\n".encode("latin-1")) == language


def test_prose_is_no_code() -> None:
    assert not CODE & {"text", "markdown", "restructuredtext", "org", "asciidoc"}
    assert {"python", "dockerfile", "just", "jupyter-notebook"} <= CODE
