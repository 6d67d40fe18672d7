"""Documents from files on this machine: the standard library, the installed packages, a tree of repositories."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import TooLarge, open_regular, read_regular, reason
from smallcoder_jax.data.sources.decode import decode_source, notebook_text
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.languages import NOTEBOOK, language_of, language_of_script
from smallcoder_jax.data.sources.licenses import package_licenses
from smallcoder_jax.data.sources.tree import File, TreeRules, walk

MAX_FILE_BYTES = 16 << 20  # a larger file is data, whatever its name, and is not read
# Installed packages are a separate source. Regression tests are excluded because not every machine has them (some
# systems package them separately), and because they outweigh the library two to one.
_LIBRARY = TreeRules(skip_folders=frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"}))
_PACKAGES = TreeRules()
_SNIFF_BYTES = 8192
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Files that package managers write, although their names look like those of source files.
_LOCK_FILES = frozenset(
    {"package-lock.json", "npm-shrinkwrap.json", "pnpm-lock.yaml", "packages.lock.json", "project.assets.json"}
    | {"conda-lock.yml", "go.sum", "package.resolved"}
)
_LOCK_EXTENSIONS = (".lock", ".lockfile")
_IGNORED = {"drop": False, "keep": True}  # values of the option `ignored` of `dir:`


def read_stdlib(source: str) -> Iterator[Document | Skipped]:
    """The Python files of the running Python's standard library, without its regression tests, in sorted order. They
    have no repository."""
    for item in walk(_stdlib_root(), _LIBRARY):
        if isinstance(item, Skipped):
            yield item
        elif item.path.suffix == ".py":
            yield _read_file(source, item, license_name="PSF-2.0")


def read_installed(source: str) -> Iterator[Document | Skipped]:
    """The Python files of the installed packages. The top-level package is the repository."""
    licenses = package_licenses()
    for item in walk_packages():
        if isinstance(item, Skipped):
            yield item
        elif item.path.suffix == ".py":
            package = item.relative.partition("/")[0].removesuffix(".py")
            yield _read_file(source, item, repository=package, license_name=licenses.get(package, ""))


def walk_packages() -> Iterator[File | Skipped]:
    """Every file of the installed packages, in sorted order, and records of what is skipped."""
    for root in _package_roots():
        yield from walk(root, _PACKAGES)


def files_of_stdlib() -> Iterator[File]:
    """The files that `read_stdlib` reads."""
    return _only(walk(_stdlib_root(), _LIBRARY), ".py")


def files_of_packages() -> Iterator[File]:
    """The files that `read_installed` reads."""
    return _only(walk_packages(), ".py")


def check_folder(source: str, location: str) -> Path:
    """The folder of a `dir:` source. Raises UserError where it is missing, is not a folder, or cannot be listed."""
    root = Path(os.path.expanduser(location))
    try:
        os.listdir(root)
    except FileNotFoundError as error:
        raise UserError(
            f"data source {source}: {root} does not exist; give the path of a folder of source code"
        ) from error
    except NotADirectoryError as error:
        raise UserError(
            f"data source {source}: {root} is not a folder; use jsonl: or parquet: for a file of documents"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(
            f"data source {source}: the folder cannot be listed: {reason(error)}; check its rights"
        ) from error
    return root


def read_folder(source: str, location: str, options: Mapping[str, str], data_dir: Path) -> Iterator[Document | Skipped]:
    """The source files of a tree, except prepared data in `data_dir` and runs. Unless the option `ignored=keep` is
    given, lock files and whatever `.gitignore` files name are excluded too. Raises UserError where the folder is
    missing or is not a folder."""
    keep = _keeps_ignored(source, options)
    for item in walk(check_folder(source, location), _folder_rules(data_dir, keep)):
        if isinstance(item, Skipped):
            yield item
        elif _is_lock_file(item) and not keep:
            yield Skipped("lock_file", item.relative)
        else:
            yield _read_file(source, item, repository=item.repository, license_name=item.license)


def files_of_folder(source: str, location: str, options: Mapping[str, str], data_dir: Path) -> Iterator[File]:
    """The files that `read_folder` reads, by their names, first lines and sizes; none if the folder does not exist."""
    keep = _keeps_ignored(source, options)
    root = Path(os.path.expanduser(location))
    for item in walk(root, _folder_rules(data_dir, keep)) if os.path.isdir(root) else ():
        if isinstance(item, Skipped) or (_is_lock_file(item) and not keep):
            continue
        if _source_language(item) and not _is_too_large(item):
            yield item


def listing_hash(files: Iterable[File], *, changes: bool) -> str:
    """A cheap hash over files: names, sizes, repositories and licences, and with `changes` the modification times."""
    digest = hashlib.sha256()
    for file in files:
        try:
            found = file.path.stat()
            facts = (found.st_size, found.st_mtime_ns if changes else 0, file.repository, file.license)
        except OSError:
            facts = ("unreadable",)
        digest.update(("|".join(map(str, (file.relative, *facts))) + "\n").encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _only(items: Iterator[File | Skipped], suffix: str) -> Iterator[File]:
    return (item for item in items if isinstance(item, File) and item.path.suffix == suffix)


def _is_too_large(file: File) -> bool:
    try:
        return file.path.stat().st_size > MAX_FILE_BYTES
    except OSError:
        return False


def _folder_rules(data_dir: Path, keep_ignored: bool) -> TreeRules:
    return TreeRules(data_dir=data_dir, gitignored=not keep_ignored, licenses=True)


def _keeps_ignored(source: str, options: Mapping[str, str]) -> bool:
    value = options.get("ignored", "drop")
    if value not in _IGNORED:
        raise UserError(
            f"data source {source}: ignored={value!r} is unknown; give ignored=keep to read lock files and what "
            ".gitignore files name, or leave it out"
        )
    return _IGNORED[value]


def _is_lock_file(file: File) -> bool:
    name = file.path.name.lower()
    return name in _LOCK_FILES or name.endswith(_LOCK_EXTENSIONS)


def _stdlib_root() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise UserError(f"this Python keeps no source files in {root}; use a Python that does, or sources=dir:PATH")
    return root


def _package_roots() -> list[Path]:
    paths = (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    roots = list(dict.fromkeys(path.resolve() for path in paths if path.is_dir()))
    if not roots:
        raise UserError("this Python has no folder of installed packages; use sources=stdlib or sources=dir:PATH")
    return roots


def _source_language(file: File) -> str | None:
    """The language of a file by its name or, where the name has no extension, by its first line; None where it is no
    source file."""
    language = language_of(file.path.name)
    if language or "." in file.path.name:
        return language
    try:
        return language_of_script(_head(file.path))
    except OSError:
        return None


def _head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_SNIFF_BYTES)


def _read_file(source: str, file: File, *, repository: str = "", license_name: str = "") -> Document | Skipped:
    language, path = _source_language(file), file.relative
    try:
        if language is None:
            return Skipped("binary" if b"\0" in _head(file.path) else "not_source", path)
        content = read_regular(file.path, MAX_FILE_BYTES)
    except TooLarge:
        return Skipped("too_large", path)
    except OSError:
        return Skipped("unreadable", path)
    if content.startswith(_LFS_POINTER):
        return Skipped("lfs_pointer", path)
    try:
        text = decode_source(content)
        if language == NOTEBOOK:
            text, language = notebook_text(text)
    except ValueError:
        return Skipped("binary" if b"\0" in content else "unreadable", path)
    if "\0" in text:
        return Skipped("binary", path)
    return Document(text, source, path, repository, language, license_name)
