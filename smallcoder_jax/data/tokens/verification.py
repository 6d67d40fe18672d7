"""Verifies token shards against their manifest while a run is already training.

Every file that a process opens is hashed once, on a thread with the lowest priority. The run waits for it only before a
document can occur for the second time (`steps_until_repeated`).
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from smallcoder_jax.base.checksums import check_file
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import reason
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.tokens.shards import Manifest, compute_fingerprint

_NICE = 19  # the lowest priority
_begun: dict[tuple[Path, str], Verification] = {}


def begin_verification(folder: Path, manifest: Manifest) -> Verification:
    """The verification of the shards in `folder`, which the first call in this process starts."""
    key = (folder.resolve(), manifest.fingerprint)
    if key not in _begun:
        _begun[key] = Verification(folder, manifest)
    return _begun[key]


def steps_until_repeated(manifest: Manifest, data: DataConfig, tokens_per_step: int) -> int:
    """The number of steps after which the first source of the mixture can repeat. 0 where it is unknown: with one
    document per row, an unknown number of tokens is cut off or skipped and is in no batch."""
    if data.packing == "document":
        return 0
    total = sum(source.weight for source in manifest.sources)
    epochs = [source.train.tokens * total / source.weight for source in manifest.sources if source.weight > 0]
    return int(min(epochs, default=0) / tokens_per_step)


class Verification:
    """Checks on a thread whether the files of a folder of shards are those that its manifest describes."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._error: UserError | None = None
        self._thread = threading.Thread(target=self._run, name="verify-shards", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the thread has ended: every file was checked, or one failed."""
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raises UserError that names a changed file, if one has been found so far; does not wait."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits until all files were checked. Raises UserError that names a changed file."""
        self._thread.join()
        self.check()

    def _run(self) -> None:
        if sys.platform == "linux":  # where each thread has its own priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            verify_shards(self._folder, self._manifest)
        except UserError as error:
            self._error = error
        except Exception as error:  # whatever the error is, unverified data is not trusted
            self._error = UserError(f"the token shards in {self._folder} cannot be verified: {reason(error)}")


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Raises UserError that names the first file whose checksum differs from the manifest. Older manifests have no
    checksums; there the fingerprint over all files is compared."""
    again = f"Prepare the data again: delete {folder} and run the same command"
    for name, recorded in manifest.checksums.items():
        check_file(folder / name, recorded, "it was prepared", again)
    if not manifest.checksums:
        found = compute_fingerprint(folder, manifest)
        if found != manifest.fingerprint:
            raise UserError(
                f"the token shards in {folder} are not those that were prepared: their fingerprint is {found[:12]}, "
                f"the manifest says {manifest.fingerprint[:12]}. {again}"
            )
