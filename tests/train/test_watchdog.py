"""The watchdog ends a process that waits too long, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from smallcoder_jax.base.errors import EXIT_STALLED
from smallcoder_jax.train.watchdog import Watchdog

HANG = """
import pathlib, sys, threading
from smallcoder_jax.train.watchdog import Watchdog

def hang_here():
    threading.Event().wait()

with Watchdog(pathlib.Path(sys.argv[1])) as watchdog:
    {body}
"""


def hang(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANG.format(body=body), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_wait_that_lasts_too_long_ends_the_process(tmp_path: Path) -> None:
    ended = hang(tmp_path, 'with watchdog.wait("a batch", 0.5): hang_here()')
    assert ended.returncode == EXIT_STALLED
    assert "stalled: waited more than 0.5 s for a batch" in ended.stderr
    (path,) = tmp_path.glob("stacks-*.txt")
    assert "in hang_here" in path.read_text()
    assert "in hang_here" in ended.stderr
    assert str(path) in ended.stderr


def test_the_end_after_a_signal_is_limited_whatever_is_waited_for(tmp_path: Path) -> None:
    ended = hang(tmp_path, 'watchdog.limit("the end", 0.5)\n    with watchdog.wait("a batch", 0): hang_here()')
    assert ended.returncode == EXIT_STALLED
    assert "waited more than 0.5 s for the end" in ended.stderr


def test_a_folder_that_is_gone_does_not_stop_it(tmp_path: Path) -> None:
    ended = hang(tmp_path / "gone", 'with watchdog.wait("a batch", 0.5): hang_here()')
    assert ended.returncode == EXIT_STALLED
    assert "cannot be written" in ended.stderr


def test_a_process_that_was_stopped_has_not_waited(tmp_path: Path) -> None:
    body = 'with watchdog.wait("a batch", 2.5): print("waits", flush=True); threading.Event().wait(0.5)'
    command = [sys.executable, "-c", HANG.format(body=body), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) == 0
    assert not list(tmp_path.iterdir())


def test_waits_that_end_in_time_and_endless_ones_are_let_be(tmp_path: Path) -> None:
    drawn = []
    with Watchdog(tmp_path) as watchdog, watchdog.wait("evaluation", 1.0):
        for item in watchdog.each("a batch", 1.0, iter(range(4))):
            time.sleep(0.4)  # 1.6 s in all: each item begins the outer wait anew
            drawn.append(item)
        with watchdog.wait("for ever", 0):
            time.sleep(1.2)
    assert drawn == [0, 1, 2, 3]
    assert not list(tmp_path.iterdir())
