"""Token shards held against their manifest while a run is at work already.

Every file that a process opens is hashed once, on a thread that runs when nothing else wants its core. Nobody waits for
it before a document could come for the second time (`steps_until_repeated`).
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
    """The verification of the shards in `folder`, begun by the first in this process who asks."""
    key = (folder.resolve(), manifest.fingerprint)
    if key not in _begun:
        _begun[key] = Verification(folder, manifest)
    return _begun[key]


def steps_until_repeated(manifest: Manifest, data: DataConfig, tokens_per_step: int) -> int:
    """The steps after which the first source of the mixture can begin anew. 0 where that is not known: where a row is
    one document, what is cut off and passed over does not come into the batches."""
    if data.packing == "document":
        return 0
    total = sum(source.weight for source in manifest.sources)
    epochs = [source.train.tokens * total / source.weight for source in manifest.sources if source.weight > 0]
    return int(min(epochs, default=0) / tokens_per_step)


class Verification:
    """Whether the files of a folder of shards are those that its manifest vouches for."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._error: UserError | None = None
        self._thread = threading.Thread(target=self._run, name="verify-shards", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether every file was looked at, or one refused."""
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raises UserError naming a file that has been found to be another; does not wait."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Raises UserError naming a file that is another, once all were looked at."""
        self._thread.join()
        self.check()

    def _run(self) -> None:
        if sys.platform == "linux":  # where threads have a priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            verify_shards(self._folder, self._manifest)
        except UserError as error:
            self._error = error
        except Exception as error:  # whatever it is, nothing is trusted that was not verified
            self._error = UserError(f"the token shards in {self._folder} cannot be verified: {reason(error)}")


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Raises UserError naming the first file that is not the one that was written, by its checksum; without checksums,
    which older manifests lack, by the fingerprint of all."""
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
