"""Trains all variants one after the other, each in its own run folder and process, and verifies them.

    python -m tools.train_all_variants --workdir=runs/all
    python -m tools.train_all_variants --workdir=runs/all --variants=tiny,small --steps=2000 --num-samples=10000
    python -m tools.train_all_variants --workdir=runs/all --config.data.sources=stdlib --dry-run
    python -m tools.train_all_variants --preset=v5e-16 --preflight

Every --config.key=value applies to all variants. WORKDIR/VARIANT is the run folder, WORKDIR/VARIANT.log its output, and
WORKDIR/training_summary.json the result of all variants. A variant that fails is recorded there with its reason, and
the others continue. The same command continues whatever is not finished, however it ended. At the end every run in the
workdir is verified. The exit code is 0 if all are trained and verified, 3 if one is not, and 75 after a signal.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.platforms import settings_of
from launch.presets import PRESETS, Preset, find_preset, preset_overrides
from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import (
    EXIT_CHECK_FAILED,
    EXIT_INTERRUPTED,
    NOT_TRIED_AGAIN,
    CheckFailed,
    UserError,
    run_cli,
)
from smallcoder_jax.base.files import finite, read_json, utc_now, write_json
from smallcoder_jax.base.terminal import format_table, human_time
from smallcoder_jax.config import Config, nearest, to_dict
from smallcoder_jax.configfile import load_config, split_overrides
from smallcoder_jax.report.run_folder import RunFolder

VARIANTS = ("tiny", "small", "medium", "tiny_lc", "small_lc", "medium_lc")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAINER = (sys.executable, "-m", "smallcoder_jax.main")
VERIFIER = (sys.executable, "-m", "tools.verify_models")
POLL_SECONDS = 0.1
INTERRUPTIONS = (EXIT_INTERRUPTED, 130)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One variant: its config file with the flags of this start, and `refusal` if they do not fit together."""

    variant: str
    file: Path
    overrides: tuple[str, ...]
    run: RunFolder
    config: Config | None
    refusal: str

    @property
    def command(self) -> list[str]:
        return [*TRAINER, f"--config={self.file}", f"--workdir={self.run.path}", *self.overrides]

    @property
    def log(self) -> Path:
        return self.run.path.with_name(f"{self.variant}.log")

    def is_trained(self, recorded: Mapping[str, Any]) -> bool:
        """Whether an earlier start trained exactly this config to its end."""
        if recorded.get("status") != "trained" or self.config is None or not self.run.config_json.is_file():
            return False
        try:
            return read_json(self.run.config_json, "the config of the run") == finite(to_dict(self.config))
        except UserError:  # damaged: the trainer examines the run itself
            return False


def main(argv: list[str] | None = None) -> int:
    """Trains and verifies. Raises UserError for a mistake that affects all variants, CheckFailed if one failed."""
    given, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(given)
    preset = find_preset(options.preset) if options.preset else None
    plans = make_plans(options, preset, overrides)
    if options.preflight:
        return preflight(plans, preset)
    if options.dry_run:
        show(plans, read_results(options.workdir))
        return 0
    environment = {**os.environ, **(settings_of(preset.platform, os.environ) if preset else {})}
    with locked(options.workdir) as lock, Child(environment, lock) as child:
        summary = Summary(options, overrides, plans)
        for plan in plans:
            if not child.stopped:
                summary.record(plan.variant, train(plan, summary.results.get(plan.variant, {}), child))
        if not child.stopped:
            summary.verify(child)
        say("\n" + summary.table())
    if child.stopped:
        return EXIT_INTERRUPTED
    summary.check()
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.train_all_variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help=f"comma-separated names of configs/NAME.py, or config files (default: {','.join(VARIANTS)})",
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/all"), help="folder of the runs (default: runs/all)")
    parser.add_argument("--steps", type=int, help="sets --config.train.steps; a short run needs a short warm-up, too")
    parser.add_argument("--num-samples", type=int, help="sets --config.data.max_documents: documents of each source")
    parser.add_argument("--preset", help=f"the hardware for which batches and mesh are set: {', '.join(PRESETS)}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--preflight", action="store_true", help="train nothing: show whether each fits the preset")
    what.add_argument("--dry-run", action="store_true", help="train nothing: show the plan and the commands")
    return parser


def make_plans(options: argparse.Namespace, preset: Preset | None, overrides: Sequence[str]) -> list[Plan]:
    """The variants to train. Raises UserError if no variant can be trained, or for an unknown name."""
    plans = []
    for variant, file in find_variants(options.variants).items():
        run = RunFolder(options.workdir / variant)
        flags = list(overrides)
        if options.num_samples is not None:
            flags.insert(0, f"--config.data.max_documents={options.num_samples}")
        if options.steps is not None:
            flags.insert(0, f"--config.train.steps={options.steps}")
        config, refusal = None, ""
        try:
            if preset is not None:
                # The preset's values depend on the length of rows, and given flags override them.
                flags = [*preset_overrides(preset, load_config(str(file), flags)), *flags]
            config = load_config(str(file), flags)
        except UserError as error:
            refusal = str(error)
        plans.append(Plan(variant, file, tuple(flags), run, config, refusal))
    if all(plan.config is None for plan in plans):
        raise UserError(plans[0].refusal)
    return plans


def find_variants(text: str) -> dict[str, Path]:
    """Config files by variant. Raises UserError for a file that does not exist, or for two with the same name."""
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.py")) if path.stem != "__init__"}
    found: dict[str, Path] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        file = Path(word) if word.endswith(".py") else known.get(word)
        if file is None or not file.is_file():
            raise UserError(f"--variants: there is no '{word}'; {nearest(word, list(known))}")
        if file.stem in found:
            raise UserError(f"--variants names '{file.stem}' twice, but its run folder is one; leave one out")
        found[file.stem] = file
    if not found:
        raise UserError(f"--variants={text!r} names none; known: {', '.join(known)}")
    return found


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[int]:
    """Locks the workdir until this process and all that it started have ended. Yields the lock for child processes to
    inherit.

    After an earlier start was killed, its child may still train; then this waits until the child has ended.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error}; choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: an earlier start, or a variant that it left behind, still trains in {workdir}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


class Child:
    """Runs one process at a time, shows what it writes to its log, and passes SIGTERM and Ctrl-C on to it.

    The log is a file and not a pipe, so that the child can continue if this process is killed.
    """

    def __init__(self, environment: Mapping[str, str], lock: int):
        self.environment, self.lock = environment, lock
        self.stopped = False
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        self.previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path, output: Path | None = None) -> tuple[int, str]:
        """The exit code, and what the process wrote to the log. `output`: a separate file for its standard output."""
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(log.open("ab"))
            source = stack.enter_context(log.open("rb"))
            source.seek(0, os.SEEK_END)
            start = source.tell()
            stdout = stack.enter_context(output.open("wb")) if output else sink
            process = subprocess.Popen(command, env=self.environment, stdout=stdout, stderr=sink, pass_fds=(self.lock,))
            self.process = process
            if self.stopped:  # the signal came before the process existed
                process.send_signal(signal.SIGTERM)
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            ended = False
            while not ended:
                ended = process.poll() is not None
                sys.stderr.write(decoder.decode(source.read()))
                sys.stderr.flush()
                if not ended:
                    time.sleep(POLL_SECONDS)
            source.seek(start)
            return process.returncode, source.read().decode("utf-8", "replace")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)  # has no effect on a process that has ended


def train(plan: Plan, recorded: dict[str, Any], child: Child) -> dict[str, Any]:
    """The result of a variant: `recorded` if it is trained already."""
    if plan.is_trained(recorded):
        say(f"{plan.variant}: trained already, in {plan.run.path}")
        return recorded
    if plan.config is None:
        return {"status": "failed", "reason": plan.refusal, "run": str(plan.run.path)}
    say(f"\n{plan.variant}: {shlex.join(plan.command)}")
    start = time.monotonic()
    code, said = child.run(plan.command, plan.log)
    result = {
        "status": "trained",
        "run": str(plan.run.path),
        "log": str(plan.log),
        "exit_code": code,
        "parameters": plan.config.model.parameter_count(),
        "seconds": round(time.monotonic() - start, 1),
    }
    if code in INTERRUPTIONS:
        return {**result, "status": "interrupted", "reason": "interrupted by a signal; the same command continues"}
    if code:
        return {**result, "status": "failed", "reason": reason_of(code, said)}
    info = read_json(plan.run.training_info_json, "what was trained")
    kept = ("steps", "tokens_seen", "final_train_loss", "best_val_loss", "train_seconds", "dummy_data", "trained_at")
    return {**result, **{name: info[name] for name in kept}}


def reason_of(code: int, said: str) -> str:
    """Why a process failed: its own message if it ended with one, otherwise how it ended and its last line."""
    for mark in ("\nerror: ", "\ncheck failed: "):
        _, found, message = ("\n" + said).rpartition(mark)
        if found and code in NOT_TRIED_AGAIN:
            return message.strip()
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = said.strip().splitlines()
    return f"{how}: {lines[-1].strip()}" if lines else how


def read_results(workdir: Path) -> dict[str, dict[str, Any]]:
    """The results that earlier starts recorded in the workdir. Raises UserError if the file is damaged."""
    path = workdir / "training_summary.json"
    if not path.is_file():
        return {}
    content = read_json(path, "the summary of earlier starts; delete it, and every run is looked at again")
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise UserError(f"{path} holds no results of earlier starts; delete it, and every run is looked at again")
    return results


class Summary:
    """`training_summary.json`, which is written after every variant. Results of earlier starts are kept."""

    def __init__(self, options: argparse.Namespace, overrides: Sequence[str], plans: Sequence[Plan]):
        self.workdir: Path = options.workdir
        self.planned = [plan.variant for plan in plans]
        self.results = read_results(self.workdir)
        configs = [plan.config for plan in plans if plan.config is not None]
        limits = sorted({config.data.max_documents for config in configs})
        self.facts = {
            "dataset": " and ".join(sorted({config.data.sources for config in configs})),
            "num_samples": limits[-1] if limits[0] else None,  # from each source; null: all
            "args": {**vars(options), "workdir": str(self.workdir), "overrides": list(overrides)},
        }
        self.verdicts: list[dict[str, Any]] = []

    def record(self, variant: str, result: dict[str, Any]) -> None:
        if result["status"] != "trained":
            say(f"{variant}: {result['status']}: {result['reason']}")
        self.results[variant] = result
        self._write()

    def _write(self) -> None:
        content = {"results": self.results, **self.facts, "timestamp": utc_now()}
        write_json(self.workdir / "training_summary.json", content)

    def verify(self, child: Child) -> None:
        """Verifies every run in the workdir, if there is any, and records the verdicts."""
        if not any(self.workdir.rglob("run.json")):
            return
        say(f"\nverifying the runs in {self.workdir}")
        output = self.workdir / "verification.json"
        command = [*VERIFIER, "--all", f"--runs={self.workdir}", "--json"]
        code, said = child.run(command, self.workdir / "verification.log", output)
        if child.stopped:
            return
        if code not in (0, EXIT_CHECK_FAILED):
            raise CheckFailed(f"verification did not finish: {reason_of(code, said)}")
        self.verdicts = read_json(output, "the verdicts of tools.verify_models")
        for verdict in self.verdicts:
            variant = str(Path(verdict["run"]).relative_to(self.workdir))
            if variant in self.results:
                self.results[variant]["verification"] = verdict
        self._write()

    def table(self) -> str:
        """A table of all variants that were ever tried in the workdir."""
        rows = []
        for variant, result in self.results.items():
            verdict = result.get("verification", {})
            rows.append(
                [
                    variant,
                    result["status"],
                    verdict.get("status", ""),
                    *(_cell(result.get(name), "{:,}") for name in ("parameters", "steps", "tokens_seen")),
                    *(_cell(result.get(name), "{:.4f}") for name in ("final_train_loss", "best_val_loss")),
                    _cell(verdict.get("bits_per_byte"), "{:.4f}"),
                    human_time(result["train_seconds"]) if "train_seconds" in result else "",
                ]
            )
        heads = ["variant", "status", "verification", "parameters", "steps", "tokens", "loss", "validation loss"]
        return format_table([*heads, "bits per byte", "time"], rows)

    def check(self) -> None:
        """Raises CheckFailed if a variant of this start is not trained, or a run in the workdir is not verified."""
        problems = [
            f"{variant} {self.results[variant]['status']}: {self.results[variant]['reason']}"
            for variant in self.planned
            if self.results[variant]["status"] != "trained"
        ]
        problems += [
            f"{verdict['run']} {verdict['status']}: {verdict['reason']}"
            for verdict in self.verdicts
            if verdict["status"] != "verified"
        ]
        if problems:
            raise CheckFailed("\n  ".join([f"not everything in {self.workdir} is trained and verified:", *problems]))


def _cell(value: float | None, shape: str) -> str:
    return "" if value is None else shape.format(value)


def show(plans: Sequence[Plan], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what would be trained, and the commands."""
    rows = []
    for plan in plans:
        if plan.is_trained(results.get(plan.variant, {})):
            state = "trained already"
        elif plan.config is None:
            state = f"refused: {plan.refusal.splitlines()[0]}"
        else:
            state = "to continue" if plan.run.run_json.is_file() else "to train"
        config = plan.config
        shape = ["", "", "", "", ""]
        if config is not None:
            train = config.train
            count = f"{config.model.parameter_count():,}"
            shape = [count, train.steps, train.batch_size, train.microbatch_rows, train.sequence_length]
        rows.append([plan.variant, *shape, plan.run.path, state])
    heads = ["variant", "parameters", "steps", "batch", "microbatch", "tokens a row", "run", "state"]
    say(format_table(heads, rows) + "\n")
    for plan in plans:
        say(shlex.join(plan.command))


def preflight(plans: Sequence[Plan], preset: Preset | None) -> int:
    """Runs preflight for every variant. Raises CheckFailed if one does not fit the preset's devices."""
    if preset is None:
        raise UserError(f"--preflight needs --preset, which names the hardware: {', '.join(PRESETS)}")
    problems = [f"{plan.variant}: {plan.refusal}" for plan in plans if plan.config is None]
    for plan in plans:
        if plan.config is not None:
            flags = ["--mode=preflight", f"--topology={preset.topology}", *plan.overrides]
            code = subprocess.run([*TRAINER, f"--config={plan.file}", *flags], check=False).returncode
            if code:
                problems.append(f"{plan.variant}: exit code {code}, see above")
    if problems:
        raise CheckFailed("\n  ".join([f"not every variant fits {preset.topology}:", *problems]))
    return 0


if __name__ == "__main__":
    run_cli(main)
