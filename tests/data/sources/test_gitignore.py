"""The rules of .gitignore files, beside git itself."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from smallcoder_jax.data.sources.gitignore import RuleFile, is_ignored, parse_rules
from smallcoder_jax.data.sources.tree import File, TreeRules, walk


def ignored(rules: str, path: str, *, is_folder: bool = False) -> bool:
    return is_ignored([RuleFile(0, parse_rules(rules.encode()))], path.split("/"), is_folder)


@pytest.mark.parametrize(
    ("rules", "path", "expected"),
    [
        ("*.log", "a/b.log", True),
        ("*.log", "b.logs", False),
        ("/b.log", "a/b.log", False),
        ("a/*.log", "x/a/b.log", False),
        ("**/a/*.log", "x/a/b.log", True),
        ("a/**/b", "a/b", True),
        ("a/**", "a/x/y", True),
        ("a/**", "a", False),
        ("a/", "a", False),
        ("*.log\n!keep.log", "keep.log", False),
        ("!keep.log\n*.log", "keep.log", True),
        ("\\#a", "#a", True),
        ("#a", "#a", False),
        ("\\!a", "!a", True),
        ("a ", "a", True),
        ("a\\ ", "a ", True),
        ("a\r\nb\r\n", "a", True),
        ("\ufeffa", "a", True),
        ("[a-c].py", "b.py", True),
        ("[!a-c].py", "b.py", False),
        ("[]x].py", "].py", True),
        ("[[:digit:]].py", "7.py", True),
        ("[a", "[a", False),
        ("a\\", "a\\", False),
        ("a?c", "a/c", False),
        ("a*c", "abbc", True),
        ("*a*b*c*", "xaxbxcx", True),
        ("*", "any", True),
        ("/", "any", False),
    ],
)
def test_rules(rules: str, path: str, expected: bool) -> None:
    assert ignored(rules, path) is expected


def test_the_nearest_file_decides_first() -> None:
    outer, inner = RuleFile(0, parse_rules(b"*.py")), RuleFile(1, parse_rules(b"!/a.py"))
    assert is_ignored([outer], ["sub", "a.py"], False)
    assert not is_ignored([inner, outer], ["sub", "a.py"], False)
    assert is_ignored([inner, outer], ["sub", "deep", "a.py"], False)


@pytest.mark.parametrize(
    ("rule", "path"), [("*a" * 100 + "*b", "a" * 250), ("**/a/" * 300 + "b", "/".join("a" * 1000))]
)
def test_a_rule_of_many_stars_takes_no_time(rule: str, path: str) -> None:
    began = time.monotonic()
    assert not ignored(rule, path)
    assert time.monotonic() - began < 1


NAMES = ("a", "b", "ab", "foo", "foo.c", "a b", "#x", "!y", "[z", "x]", "é", "foo-1", "Z9", "sp ", "back\\s", "a*b")
PIECES = ("a", "b", "foo", "*", "**", "***", "?", "/", "/", "!", "\\", "[ab]", "[!a]", "[^b-z]", "[]x]", "[[:alpha:]]")
MORE_PIECES = ("[z-a]", "[a", "\\*", "\\#", "\\!", "\\ ", " ", ".c", "-1", "#", "[a-]", "[\\]]", "[[:none:]]", "o")


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
@pytest.mark.parametrize("seed", range(40))
def test_random_rules_ignore_what_git_ignores(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    folders = [tmp_path]
    for _ in range(12):
        folder = draw.choice(folders) / draw.choice(NAMES)
        if not folder.exists():
            folder.mkdir()
            folders.append(folder)
    for folder in folders:
        for name in draw.sample(NAMES, 4):
            if not (folder / name).exists():
                (folder / name).write_text("x")
    for folder in {tmp_path, *draw.choices(folders, k=3)}:
        lines = ["".join(draw.choices(PIECES + MORE_PIECES, k=draw.randint(1, 5))) for _ in range(draw.randint(1, 4))]
        lines = ["*"] * (draw.random() < 0.3) + lines
        (folder / ".gitignore").write_bytes(draw.choice(["\n", "\r\n"]).join(lines).encode())
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    subprocess.run(["git", "init", "-q", tmp_path], check=True, env=environment)
    command = ["git", "-C", str(tmp_path), "ls-files", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    kept = {path for path in listed.split("\0") if path and not path.endswith(".gitignore")}
    found = walk(tmp_path, TreeRules(gitignored=True))
    assert {item.relative for item in found if isinstance(item, File)} == kept
