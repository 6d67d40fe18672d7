"""Folders that are either complete or absent, and the error message when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smallcoder_jax.base.checksums import check_file, checksums_of, is_checksum
from smallcoder_jax.base.errors import UserError

KEY_LENGTH = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SMALL = 1 << 20  # bytes; a file system with less free space counts as full


def short_key(value: Any) -> str:
    """A name for a folder: the start of a hash over `value`, everything that determines the folder's content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def sealed(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The facts by which `check_sealed` later detects a change to these files of `folder`: `files`, their checksums,
    and `fingerprint`, a hash over the checksums. Raises OSError."""
    files = checksums_of(folder, names)
    return {"files": files, "fingerprint": _fingerprint(files)}


def check_sealed(folder: Path, facts: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    """Raises UserError where the files `names` of `folder` differ from `facts`, which `sealed` returned for them.
    `what` names the files in the message."""
    again = f"Delete the folder {folder}, and the same command makes it again"
    files = facts.get("files", {})
    sound = isinstance(files, dict) and list(files) == list(names) and all(map(is_checksum, files.values()))
    if not sound or facts.get("fingerprint") != _fingerprint(files):
        raise UserError(f"the {what} in {folder}: their checksums are damaged. {again}")
    for name in names:
        check_file(folder / name, files[name], "they were made", again)


def _fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256("".join(entry["sha256"] for entry in files.values()).encode()).hexdigest()


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder next to `final`, renamed to `final` at the end of the block and removed when the block fails.

    If another process has created `final` in the meantime, its folder is kept. Raises UserError when the folder cannot
    be created or the disk is full.
    """
    with full_disk_as_user_error(final.parent):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise UserError(
                f"the folder {final.parent} cannot be made or written to: {error.strerror}. Set data.dir to a folder "
                "that can"
            ) from error
        try:
            yield temporary
            temporary.chmod(0o755)  # mkdtemp gives only the owner access, but prepared data is shared between runs
            try:
                temporary.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def full_disk_as_user_error(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk or an exhausted quota into a UserError that says which disk and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError with the system's message
        full = getattr(error, "errno", None) in _FULL or "No space left on device" in str(error)
        if not full:
            raise
        temporary = Path(tempfile.gettempdir())
        if is_full(temporary) and not is_full(folder):
            raise UserError(
                f"the disk of {temporary}, where temporary files go, is full ({error}). Nothing half-made was kept. "
                "Free some space, or let the environment variable TMPDIR name a folder on a larger disk; then run the "
                "same command again"
            ) from error
        raise UserError(
            f"the disk of {folder} is full ({error}). Nothing half-made was kept. Free some space, set data.dir to a "
            "larger disk, or read less with data.max_documents; then run the same command again"
        ) from error


def is_full(folder: Path) -> bool:
    """Whether the file system of a folder has almost no space left, or no free inode."""
    try:
        found = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _SMALL or (found.f_files > 0 and found.f_favail == 0)
