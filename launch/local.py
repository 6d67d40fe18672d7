"""Trains on this machine, in one process or several, and starts them again after a crash, from the last checkpoint.

    python -m launch.local -- --config=configs/nano.py --workdir=runs/nano
    python -m launch.local --platform=gpu -- --config=configs/tiny.py --workdir=runs/tiny     # all GPUs, one process
    python -m launch.local --processes=2 --dry-run -- --config=configs/nano.py                # shows, runs nothing

The arguments after `--` go to smallcoder_jax.main unchanged. When one process fails, all end. If a second attempt would
change nothing, this program ends with the same code: 2 for a mistake, 3 for a failed check, 4 for a diverged run, 130
for Ctrl-C. After anything else (out of memory, a signal, the death of another process, or 75: interrupted and saved) it
starts again, at most --retries times. SIGTERM and Ctrl-C are passed on to the processes, and end all attempts.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

from launch.platforms import PLATFORMS, settings_of
from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import NOT_TRIED_AGAIN

FINAL = (0, *NOT_TRIED_AGAIN, 130)
GRACE_SECONDS = 90.0  # after a failure, for the others to notice it (distributed.HEARTBEAT_SECONDS) and end
POLL_SECONDS = 0.05


class Command(NamedTuple):
    environment: dict[str, str]  # variables in addition to the launcher's
    words: list[str]

    def __str__(self) -> str:
        return shlex.join([f"{key}={value}" for key, value in self.environment.items()] + self.words)


def commands(options: argparse.Namespace, environment: Mapping[str, str]) -> list[Command]:
    """One command per process; the processes meet at a port that is currently free."""
    made = []
    where = f"127.0.0.1:{_free_port()}"
    for process in range(options.processes):
        added = settings_of(options.platform, environment)
        if options.devices and options.platform == "cpu":
            flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
            added["XLA_FLAGS"] = flags.strip()
        elif options.devices:
            first = process * options.devices
            added["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + options.devices)))
        words = [sys.executable, "-m", "smallcoder_jax.main", *options.arguments]
        if options.processes > 1:
            words += [f"--coordinator={where}", f"--processes={options.processes}", f"--process={process}"]
        made.append(Command(added, words))
    return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launcher:
    """Runs attempts one after the other, each with all processes."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.stopped = False
        self.running: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """The exit code of the last attempt."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        code = 0
        for attempt in range(self.options.retries + 1):
            if attempt:
                self._pause()
                say(f"launch: attempt {attempt + 1}", sys.stderr)
            code = self._attempt()
            if code in FINAL or self.stopped:
                return code
            say(f"launch: the trainer ended with code {code}", sys.stderr)
        return code

    def _attempt(self) -> int:
        """The exit code of the first process that failed, or 0."""
        for command in commands(self.options, os.environ):
            if not self.stopped:
                self.running.append(subprocess.Popen(command.words, env={**os.environ, **command.environment}))
        deadline = None
        code = 0
        while any(process.poll() is None for process in self.running):
            time.sleep(POLL_SECONDS)
            code = self._worse(code)
            if code and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                for process in self.running:
                    process.kill()  # has no effect on a process that has ended
        code = self._worse(code)
        self.running = []
        return code

    def _worse(self, code: int) -> int:
        """`code`, the first failure so far; or the present failure, if there was none or the present one is final."""
        failure = _failure(self.running)
        return failure if not code or failure in FINAL[1:] else code

    def _pause(self) -> None:
        end = time.monotonic() + self.options.pause
        while time.monotonic() < end and not self.stopped:
            time.sleep(POLL_SECONDS)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        for process in self.running:
            process.send_signal(signal.SIGTERM)


def _failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The code of a process that has failed, preferably a final code; 0 if none has failed."""
    codes = [process.returncode for process in processes if process.returncode]
    codes = [128 - code if code < 0 else code for code in codes]
    return next((code for code in codes if code in FINAL), codes[0] if codes else 0)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m launch.local",
        usage="%(prog)s [options] -- ARGUMENTS OF smallcoder_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        metavar="D",
        help="devices of each process: D simulated ones on a CPU, the next D GPUs on a GPU node; default: all",
    )
    parser.add_argument("--platform", choices=sorted(PLATFORMS), default="cpu")
    parser.add_argument("--retries", type=int, default=3, metavar="N")
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="wait before another attempt")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.arguments = given[cut + 1 :]
    if not options.arguments:
        parser.error("-- and the arguments of smallcoder_jax.main are missing")
    if options.processes < 1 or options.devices < 0 or options.retries < 0:
        parser.error("--processes is at least 1; --devices and --retries are not negative")
    if options.platform == "gpu" and options.processes > 1 and not options.devices:
        parser.error("several processes on a GPU node need --devices: how many GPUs each takes")
    if options.platform == "tpu" and (options.processes > 1 or options.devices):
        parser.error("a TPU machine runs one process with all of its chips")
    if options.dry_run:
        for command in commands(options, os.environ):
            say(str(command))
        return 0
    return Launcher(options).run()


if __name__ == "__main__":
    sys.exit(main())
