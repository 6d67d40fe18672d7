"""Conversations that call functions, generated once and stored under `data.dir`."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smallcoder_jax.base.artifacts import short_key
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.conversations.generate import FORMAT, Draft, complete, draw
from smallcoder_jax.data.conversations.store import Dialogs, open_dialogs, write_dialogs
from smallcoder_jax.toolbox.functions import Execute

_STORE = 2  # increased whenever the format of these files changes


def prepare_tool_dialogs(
    root: Path, count: int, seed: int, execute: Execute, progress: Progress | None = None
) -> Dialogs:
    """`count` conversations with different requests, stored under `root` and generated where they do not exist yet.

    They are the conversations of the first indices of the seed, on every machine. Their calls are really executed,
    several at a time. Raises UserError where this machine cannot run them, and for a full disk.
    """
    version = platform.python_version()
    folder = root.expanduser() / "dialogs" / short_key([_STORE, FORMAT, version, count, seed])
    if not folder.is_dir():
        if progress:
            progress.start(f"conversations, whose calls are executed, {count:,}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            drafts = list(different(seed, count))  # made first: it parses code, which only one thread may do
            records = pool.map(lambda draft: complete(draft, execute), drafts)
            write_dialogs(folder, records, f"{count:,} generated conversations", progress)
    return open_dialogs(folder)


def different(seed: int, count: int) -> Iterator[Draft]:
    """The first `count` drafts of a seed whose requests differ in more than case and whitespace."""
    seen = set()
    for index in itertools.count():
        draft = draw(seed, index)
        request = " ".join(draft.plan.request.casefold().split())
        if request in seen:
            continue
        seen.add(request)
        if len(seen) > count:
            return
        yield draft
