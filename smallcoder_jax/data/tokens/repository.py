"""Repositories as single documents: files in dependency order, each after the files that it imports."""

from __future__ import annotations

import collections
import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from smallcoder_jax.data.sources.document import Document

_IMPORT = re.compile(
    r"^(?:from[ \t]+(?P<base>\.*[\w.]*)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n#]*)|import[ \t]+(?P<plain>[^\n#]*))",
    re.MULTILINE,
)
_NAME = re.compile(r"[\w.]+")


def group_repositories(documents: Iterable[Document]) -> Iterator[tuple[Document, ...]]:
    """Groups of documents: those of one repository together, in dependency order, and each document without a
    repository by itself."""
    groups: dict[str, list[Document]] = collections.defaultdict(list)
    single: list[Document] = []
    for document in documents:
        (groups[document.repository] if document.repository else single).append(document)
    for name in sorted(groups):
        yield tuple(dependency_order(groups[name]))
    yield from ((document,) for document in single)


def dependency_order(files: Sequence[Document]) -> list[Document]:
    """The files of one repository, each after the files of the repository that it imports, otherwise sorted by path.

    Only Python imports are resolved. A cycle is entered at its first file by path.
    """
    ordered = sorted(files, key=lambda file: (file.path, file.hash))
    imported = _imports(ordered)
    importers: dict[int, list[int]] = collections.defaultdict(list)
    for i, targets in enumerate(imported):
        for target in targets:
            importers[target].append(i)
    waiting = [len(targets) for targets in imported]
    ready = [i for i, count in enumerate(waiting) if count == 0]
    done = [False] * len(ordered)
    first_left = 0
    result = []
    while len(result) < len(ordered):
        if ready:
            i = heapq.heappop(ready)
        else:
            while done[first_left]:
                first_left += 1
            i = first_left
        if done[i]:
            continue
        done[i] = True
        result.append(ordered[i])
        for importer in importers[i]:
            waiting[importer] -= 1
            if waiting[importer] == 0:
                heapq.heappush(ready, importer)
    return result


def _imports(files: Sequence[Document]) -> list[set[int]]:
    """For each file, the indices of the other files that it imports at its top level."""
    modules = _module_names(files)
    result = []
    for i, file in enumerate(files):
        targets: set[int] = set()
        if file.path.endswith((".py", ".pyi")):
            for names in _imported_names(file):
                target = next((modules[name] for name in names if name in modules), i)
                targets.update({target} - {i})
        result.append(targets)
    return result


def _module_names(files: Sequence[Document]) -> dict[str, int]:
    """The index of a file by its dotted name. A file is also found by any end of its name that no other file shares,
    because a repository may keep its packages in a folder such as `src`."""
    owners: dict[str, list[int]] = collections.defaultdict(list)
    for i, file in enumerate(files):
        parts = _dotted(file.path)
        for start in range(len(parts)):
            owners[".".join(parts[start:])].append(i)
    full = {".".join(_dotted(file.path)): i for i, file in enumerate(files) if _dotted(file.path)}
    return {name: numbers[0] for name, numbers in owners.items() if len(numbers) == 1} | full


def _dotted(path: str) -> list[str]:
    if not path.endswith((".py", ".pyi")):
        return []
    parts = list(PurePosixPath(path).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imported_names(file: Document) -> Iterator[tuple[str, ...]]:
    """For each import, the dotted names that it may refer to: `from a import b` refers to `a.b`, or else to `a`."""
    package = list(PurePosixPath(file.path).parts[:-1])
    for match in _IMPORT.finditer(file.text):
        if match["plain"] is not None:
            for part in match["plain"].split(","):
                name = _NAME.match(part.strip())
                if name:
                    yield (name[0],)
            continue
        base = match["base"]
        dots = len(base) - len(base.lstrip("."))
        stem = base[dots:].split(".") if base[dots:] else []
        if dots > len(package) + 1:
            continue
        if dots:
            stem = package[: len(package) - (dots - 1)] + stem
        names = _NAME.findall(re.sub(r"\bas[ \t]+\w+", "", match["names"]))
        if not names:  # `import *`
            yield (".".join(stem),)
        for name in names:
            yield ".".join([*stem, name]), ".".join(stem)
