"""Documents from files of this machine: the standard library, the installed packages, a tree of repositories."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.documents import Document, Skipped
from smallcoder_jax.data.languages import language_of

# Installed packages are another source. The regression tests are not on every machine (some systems package them
# apart), and where they are, they outweigh the library two to one.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
_SNIFF_BYTES = 8192
_OUTPUTS = ("corpus", "tokenizers", "tokens", "dialogs", "preferences")  # what this package writes below `data.dir`


def read_stdlib(source: str) -> Iterator[Document | Skipped]:
    """The Python files of the running Python's standard library without its regression tests, in sorted order. They
    belong to no repository."""
    root = _stdlib_root()
    for item in _read_tree(root, source, skip_folders=_NOT_LIBRARY, extension=".py"):
        yield _with(item, "", "PSF-2.0")


def read_installed(source: str) -> Iterator[Document | Skipped]:
    """The Python files of the installed packages; the top-level package is the repository."""
    licenses = package_licenses()
    for root in _package_roots():
        for item in _read_tree(root, source, extension=".py"):
            package = item.path.partition("/")[0].removesuffix(".py")
            yield _with(item, package, licenses.get(package, ""))


def files_of_packages() -> Iterator[tuple[Path, Path]]:
    """Every file of the installed packages in sorted order, behind the folder that they are installed in."""
    for root in _package_roots():
        for path in _walk(root, frozenset(), [], None):
            yield root, path


def read_folder(source: str, location: str, data_dir: Path) -> Iterator[Document | Skipped]:
    """The source files of a tree, without prepared data in `data_dir` and without runs. A folder that holds `.git` is
    one repository; otherwise, where the tree has several folders with files at its top, each is one. Raises UserError
    where the folder is missing or no folder."""
    root = Path(location).expanduser()
    if not root.exists():
        raise UserError(f"data source {source}: {root} does not exist; give the path of a folder of source code")
    if not root.is_dir():
        raise UserError(f"data source {source}: {root} is not a folder; use jsonl: or parquet: for a file of documents")
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"data source {source}: {root} cannot be listed: {error.strerror}; check its rights") from error
    top = [root / name for name in folders if not _is_output(root / name, data_dir)]
    several = sum(any(True for _ in _walk(folder, frozenset(), [], data_dir)) for folder in top) > 1
    repositories = _Repositories(root, several)
    for item in _read_tree(root, source, data_dir=data_dir):
        yield _with(item, repositories.of(item.path), "") if isinstance(item, Document) else item


def listing_hash(kind: str, location: str, data_dir: Path) -> str:
    """A cheap hash of what a local source holds: names and sizes, and for the user's own files the times of change.

    Prepared data and runs among the user's own files are left out: otherwise each preparation would change the hash.
    """
    digest = hashlib.sha256()
    if kind == "stdlib":
        digest.update(sys.version.encode())
    times = kind not in ("stdlib", "installed", "prose")
    for root in _roots(kind, location):
        if root.is_file():
            digest.update(_listing_line(root, root.name, times))
        elif root.is_dir():
            skip = _NOT_LIBRARY if kind == "stdlib" else frozenset()
            for path in _walk(root, skip, [], data_dir if times else None):
                digest.update(_listing_line(path, path.relative_to(root).as_posix(), times))
    return digest.hexdigest()


def _roots(kind: str, location: str) -> list[Path]:
    if kind == "stdlib":
        return [_stdlib_root()]
    return _package_roots() if kind in ("installed", "prose") else [Path(location).expanduser()]


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


def package_licenses() -> dict[str, str]:
    """The licence of each top-level package as its metadata names it; empty where it names none."""
    licenses = {}
    for package, distributions in importlib.metadata.packages_distributions().items():
        metadata = importlib.metadata.metadata(distributions[0])
        named = metadata.get_all("License-Expression") or [
            line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
        ]
        # The free-text field comes last: some packages put the whole licence there.
        named = named or [line.strip().partition("\n")[0][:100] for line in metadata.get_all("License") or []]
        licenses[package] = ", ".join(named)
    return licenses


def _with(item: Document | Skipped, repository: str, license_name: str) -> Document | Skipped:
    if isinstance(item, Skipped):
        return item
    return Document(item.text, item.source, item.path, repository, item.language, license_name)


def _read_tree(
    root: Path,
    source: str,
    skip_folders: frozenset[str] = frozenset(),
    extension: str = "",
    data_dir: Path | None = None,
) -> Iterator[Document | Skipped]:
    skipped: list[Skipped] = []
    for path in _walk(root, skip_folders, skipped, data_dir):
        yield from skipped
        skipped.clear()
        relative = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
        if not extension or path.name.endswith(extension):
            yield _read_file(root, path, relative, source)
    yield from skipped


def _walk(root: Path, skip_folders: frozenset[str], skipped: list[Skipped], data_dir: Path | None) -> Iterator[Path]:
    """Every file under `root` in sorted order; what is passed over on the way is added to `skipped`. With `data_dir`,
    what this package wrote there, and its runs, are passed over too."""

    def refused(error: OSError) -> None:
        skipped.append(Skipped("unreadable", str(error.filename)))

    for folder, folders, files in os.walk(root, onerror=refused):
        here = Path(folder)
        skipped.extend(Skipped("hidden", str(here / name)) for name in folders if name.startswith("."))
        skipped.extend(Skipped("link", str(here / name)) for name in folders if (here / name).is_symlink())
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in skip_folders and name != "__pycache__"
        )
        if data_dir is not None:
            outputs = {name for name in folders if _is_output(here / name, data_dir)}
            skipped.extend(Skipped("output", str(here / name)) for name in folders if name in outputs)
            folders[:] = [name for name in folders if name not in outputs]
        yield from (here / name for name in sorted(files) if not name.startswith("."))


def _is_output(folder: Path, data_dir: Path) -> bool:
    """Whether this package wrote a folder: `data_dir`, what it keeps there, or a run."""
    known = (data_dir, *(data_dir / name for name in _OUTPUTS))
    if folder.name in (data_dir.name, *_OUTPUTS) and Path(os.path.realpath(folder)) in known:
        return True
    return (folder / "run.json").is_file() and (folder / "checkpoints").is_dir()


def _read_file(root: Path, path: Path, relative: str, source: str) -> Document | Skipped:
    language = language_of(relative)
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root.resolve()):
            return Skipped("link", relative)
        if not stat.S_ISREG(path.stat().st_mode):
            return Skipped("unreadable", relative)
        if language is None:
            with path.open("rb") as file:
                return Skipped("binary" if b"\0" in file.read(_SNIFF_BYTES) else "not_source", relative)
        raw = path.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return Skipped("unreadable", relative)
    if b"\0" in raw:
        return Skipped("binary", relative)
    try:
        return Document(raw.decode("utf-8"), source, relative, "", language)
    except UnicodeDecodeError:
        return Skipped("unreadable", relative)


def _listing_line(path: Path, name: str, times: bool) -> bytes:
    try:
        found = path.stat()
    except OSError:
        return f"{name}|unreadable\n".encode("utf-8", "surrogateescape")
    changed = found.st_mtime_ns if times else 0
    return f"{name}|{found.st_size}|{changed}\n".encode("utf-8", "surrogateescape")


class _Repositories:
    """The repository that a path of a tree belongs to."""

    def __init__(self, root: Path, several: bool):
        self._root, self._several = root, several
        self._known: dict[str, str] = {"": root.resolve().name if (root / ".git").exists() else ""}

    def of(self, path: str) -> str:
        folder = path.rpartition("/")[0]
        return self._of_folder(folder) or (path.partition("/")[0] if self._several and folder else "")

    def _of_folder(self, folder: str) -> str:
        """The innermost folder with `.git` that holds `folder`, or nothing."""
        if folder not in self._known:
            here = (self._root / folder / ".git").exists()
            self._known[folder] = folder if here else self._of_folder(folder.rpartition("/")[0])
        return self._known[folder]
