"""Damages files that a user may have, with a seed, and reads them as the commands do: `python -m tests.faults.fuzz`.

Whatever a file holds, reading it gives its content or one of the errors that `run_cli` turns into a message. Each case
has 10 seconds and 2 GiB. A process of its own, so that a crash of a library is an answer too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import CheckFailed, Diverged, Interrupted, UserError

SECONDS, BYTES = 10, 2 << 30
MESSAGES = (UserError, CheckFailed, Diverged, Interrupted)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "\0", "\ud800", "\u202e", "\x1b[2J", "../../etc/passwd", "/dev/zero", "a" * 5000, "é\n|<b>"),
    *([], {}, [[]], [None], {"": {}}, {"a": [1, {"b": None}]}, ["x"] * 50),
)
ODD_BYTES = (b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[" * 3000, b"]" * 50, b"\n", b'"', b"9" * 5000, b"\r")


class Hangs(BaseException):
    """A case took too long. Not an Exception: nothing on the way may take it for its own."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Files below `folder` that are damaged one at a time, and what reads them."""

    folder: Path
    files: Sequence[Path]
    read: Callable[[random.Random], object]


def odd_json(value: Any, rng: random.Random) -> Any:
    """`value` with one part of it exchanged, left out, doubled or renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(ODD_VALUES)
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[str(rng.choice(ODD_VALUES))[:100]] = holder.pop(key)
    elif how == 2:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name] if name in other or isinstance(other, list) else None)
    elif how == 3:
        for _ in range(rng.choice((3, 60, 2000))):
            holder[key] = [holder[key]]
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [value]
    while waiting:
        outer = waiting.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else ()
        for key in keys:
            yield outer, key
            waiting.append(outer[key])


def odd_bytes(content: bytes, rng: random.Random) -> bytes:
    """`content` with bits flipped, cut off, or with something in its midst."""
    place = rng.randrange(len(content) + 1)
    how = rng.randrange(5)
    if how == 0:
        return content[:place]
    if how == 1:
        return content[:place] + rng.choice(ODD_BYTES) + content[place:]
    if how == 2:
        return content[:place] + rng.randbytes(rng.randrange(1, 64)) + content[place + rng.randrange(1, 64) :]
    if how == 3:
        return rng.randbytes(rng.randrange(200))
    flipped = bytearray(content or b"x")
    for _ in range(rng.randrange(1, 4)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def damage(path: Path, rng: random.Random) -> str:
    """Puts something else in the place of a file; says what."""
    content = path.read_bytes()
    how = rng.randrange(20)
    odd = {0: "fifo", 1: "folder", 2: "device", 3: "loop", 4: "sparse", 5: "missing"}.get(how)
    if odd is not None:
        path.unlink()
    if odd == "fifo":
        os.mkfifo(path)
    elif odd == "folder":
        path.mkdir()
    elif odd in ("device", "loop"):
        path.symlink_to("/dev/zero" if odd == "device" else path.name)
    elif odd == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif odd is None and how < 14 and path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        at = rng.randrange(len(lines))
        with contextlib.suppress(RecursionError, ValueError):
            lines[at] = json.dumps(odd_json(json.loads(lines[at]), rng)).encode()
        path.write_bytes(b"\n".join(lines))
        return "other values"
    elif odd is None:
        path.write_bytes(odd_bytes(content, rng))
        return "other bytes"
    assert odd is not None
    return odd


def restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raises Hangs after SECONDS, MemoryError after BYTES more than there are now."""

    def hangs(*_: Any) -> None:
        raise Hangs(f"longer than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # a library that waits hears no signal
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(read: Callable[[], object]) -> str:
    """Empty where reading gave a value or a message; else what came instead, with its traceback."""
    try:
        with limits(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read()
    except MESSAGES as error:
        return "" if len(str(error)) < 20_000 else f"a message of {len(str(error)):,} characters: {str(error)[:300]}"
    except SystemExit as error:
        return "" if error.code == 2 else f"left with {error.code}"
    except (Exception, Hangs):
        return traceback.format_exc()
    return ""


def run(name: str, count: int, seed: int, tell: Callable[[str], None]) -> int:
    """Tries `count` cases of a target; returns how many failed. `tell` gets each before it is tried."""
    from tests.faults import fuzz_targets

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        target: Target = getattr(fuzz_targets, name)(Path(folder))
        contents = {path: path.read_bytes() for path in target.files}
        problem = attempt(lambda: target.read(random.Random(0)))
        assert not problem, f"{name}: what is not damaged cannot be read: {problem}"
        for case in range(count):
            rng = random.Random(f"{name}|{seed}|{case}")
            path = rng.choice(list(contents))
            how = damage(path, rng)
            tell(f"{name} {case}: {path.relative_to(target.folder)}, {how}")
            problem = attempt(lambda rng=rng: target.read(rng))
            restore(path, contents[path])
            if problem:
                failed += 1
                print(f"FAILED {name} {case}: {path.relative_to(target.folder)}, {how}\n{problem}", flush=True)
    return failed


if __name__ == "__main__":
    name, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    last = Path(os.environ["FUZZ_LAST"]) if "FUZZ_LAST" in os.environ else None
    failures = run(name, count, seed, last.write_text if last else lambda case: None)  # pyright: ignore
    print(
        f"{name}: {count} cases, {failures} failed, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )
    sys.exit(1 if failures else 0)
