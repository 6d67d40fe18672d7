"""Walks through a tree of files and determines which are skipped, and the repository and licence of each file.

The folders that remain to be visited are kept in a list, so that no tree is too deep.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from smallcoder_jax.base.files import read_regular
from smallcoder_jax.data.sources import gitignore
from smallcoder_jax.data.sources.document import Skipped
from smallcoder_jax.data.sources.licenses import is_license_file, license_of_files

_CACHE = "__pycache__"
_UNCOUNTED = "uncounted"
_OUTPUTS = ("corpus", "tokenizers", "tokens", "dialogs", "preferences", "teachers")  # written to `data.dir`
_MAX_RULES_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class TreeRules:
    """What a walk skips in addition to hidden files and caches.

    `skip_folders`: folders with these names, which are not counted. `data_dir`: what this package wrote there, and its
    runs. `gitignored`: whatever `.gitignore` files name. Licence files are read only with `licenses`.
    """

    skip_folders: frozenset[str] = frozenset()
    data_dir: Path | None = None
    gitignored: bool = False
    licenses: bool = False


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a tree. `relative` is its path within the tree. `repository` and `license` are empty if unknown."""

    path: Path
    relative: str
    repository: str
    license: str


@dataclasses.dataclass(frozen=True)
class _Folder:
    path: str
    parts: tuple[str, ...]  # its path within the repository that contains the tree, or else within the tree
    relative: str
    repository: str
    license: str
    rules: tuple[gitignore.RuleFile, ...]  # the nearest first


def walk(root: Path, rules: TreeRules) -> Iterator[File | Skipped]:
    """Every file below `root`, and what is skipped, sorted by name, with the files of a folder before its subfolders.

    A folder that holds `.git` is one repository. Otherwise, where several folders at the top of the tree hold files,
    each of them is one. The licence is that of the nearest folder with a licence file within the same repository.
    """
    real, start = os.path.realpath(root), _start(root, rules)
    found, inside = _list(start, rules, real, several=False)
    yield from found
    several = sum(_holds_files(folder, rules, real) for folder in inside) > 1
    if several:
        inside = _list(start, rules, real, several=True)[1]
    yield from _visit(inside, rules, real)


def repository_above(folder: Path) -> Path | None:
    """The nearest folder with a `.git` among a folder and its parents; None where there is none."""
    real = Path(os.path.realpath(folder))
    return next((path for path in (real, *real.parents) if os.path.lexists(path / ".git")), None)


def printable_path(path: str) -> str:
    """A path as text that UTF-8 can encode: bytes that are not UTF-8 become escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _holds_files(folder: _Folder, rules: TreeRules, real: str) -> bool:
    return any(isinstance(item, File) for item in _visit([folder], rules, real))


def _visit(folders: list[_Folder], rules: TreeRules, real: str) -> Iterator[File | Skipped]:
    waiting = folders[::-1]
    while waiting:
        found, inside = _list(waiting.pop(), rules, real, several=False)
        yield from found
        waiting += reversed(inside)


def _start(root: Path, rules: TreeRules) -> _Folder:
    """The folder in which the walk begins, with the rules and the licence of the repository that contains it."""
    real = Path(os.path.realpath(root))
    top = repository_above(real) or real
    folder = _Folder(str(top), (), "", "", "", ())
    for name in real.relative_to(top).parts:
        folder = _with_own(folder, _names(folder.path), rules)
        folder = dataclasses.replace(folder, path=os.path.join(folder.path, name), parts=(*folder.parts, name))
    return dataclasses.replace(folder, path=str(root), repository="")


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _with_own(folder: _Folder, names: list[str], rules: TreeRules) -> _Folder:
    """The folder with its own rules added before those of its parent, and its own licence in place of the parent's."""
    repository, license_name, ignored_by = folder.repository, folder.license, folder.rules
    own = [gitignore.NAME] if gitignore.NAME in names else []
    if ".git" in names:  # another repository, for which the rules and the licence outside it do not apply
        repository = folder.relative or os.path.basename(os.path.realpath(folder.path))
        license_name, ignored_by = "", ()
        own.append(".git/info/exclude")
    licenses = sorted(name for name in names if is_license_file(name)) if rules.licenses else []
    if licenses:
        license_name = license_of_files([Path(folder.path, name) for name in licenses]) or license_name
    if rules.gitignored:
        found = (_read_rules(Path(folder.path, name), len(folder.parts)) for name in own)
        ignored_by = (*(file for file in found if file), *ignored_by)
    return dataclasses.replace(folder, repository=repository, license=license_name, rules=ignored_by)


def _read_rules(path: Path, depth: int) -> gitignore.RuleFile | None:
    try:
        return gitignore.RuleFile(depth, gitignore.parse_rules(read_regular(path, _MAX_RULES_BYTES)))
    except OSError:  # git ignores an unreadable file too
        return None


def _list(folder: _Folder, rules: TreeRules, real: str, *, several: bool) -> tuple[list[File | Skipped], list[_Folder]]:
    """The content of a folder: files and records of what is skipped, and the folders to visit. `several`: each of these
    folders is a repository named after it."""
    try:
        with os.scandir(folder.path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        return [Skipped("unreadable", folder.relative or ".")], []
    folder = _with_own(folder, [entry.name for entry in entries], rules)
    found: list[File | Skipped] = []
    inside: list[_Folder] = []
    for entry in entries:
        relative = printable_path(f"{folder.relative}/{entry.name}" if folder.relative else entry.name)
        is_folder = _is_folder(entry)
        reason = _reason(entry, folder, rules, real, is_folder)
        if reason == _UNCOUNTED:
            continue
        if reason:
            found.append(Skipped(reason, relative))
        elif not is_folder:
            found.append(File(Path(entry.path), relative, folder.repository, folder.license))
        else:
            repository = folder.repository or (relative if several else "")
            parts = (*folder.parts, entry.name)
            inside.append(_Folder(entry.path, parts, relative, repository, folder.license, folder.rules))
    return found, inside


def _reason(entry: os.DirEntry[str], folder: _Folder, rules: TreeRules, real: str, is_folder: bool) -> str:
    """The reason to skip an entry; empty where it is not skipped."""
    if entry.name.startswith("."):
        return "hidden"
    if is_folder and entry.name == _CACHE:
        return "cache"
    if is_folder and entry.name in rules.skip_folders:
        return _UNCOUNTED
    if entry.is_symlink():
        return _reason_of_link(entry, real)
    if is_folder and rules.data_dir is not None and _is_output(entry, rules.data_dir):
        return "output"
    if rules.gitignored and gitignore.is_ignored(folder.rules, (*folder.parts, entry.name), is_folder):
        return "ignored"
    return ""


def _reason_of_link(entry: os.DirEntry[str], real: str) -> str:
    try:
        if entry.is_dir():  # not followed, because it may lead out of the tree or form a loop
            return "link"
        target = os.path.realpath(entry.path, strict=True)
    except FileNotFoundError:
        return "unreadable"
    except OSError:  # a loop of links
        return "link"
    return "" if Path(target).is_relative_to(real) else "link"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_output(folder: os.DirEntry[str], data_dir: Path) -> bool:
    """Whether this package wrote a folder: `data_dir`, one of the folders in it, or a run."""
    known = (data_dir, *(data_dir / name for name in _OUTPUTS))
    if folder.name in (data_dir.name, *_OUTPUTS) and Path(os.path.realpath(folder.path)) in known:
        return True
    return os.path.isfile(folder.path + "/run.json") and os.path.isdir(folder.path + "/checkpoints")
