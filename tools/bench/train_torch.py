"""Compares ours with a plain PyTorch trainer that gets the same model, text and time.

    python -m tools.bench.train_torch --config=configs/nano.py --workdir=runs/beside [--record] [--config.key=value ...]

Ours is trained with its config, and the time is measured, including start, compilation, evaluations and checkpoints.
Then transformers' LlamaForCausalLM of the same shape is trained for the same number of seconds, once in float32 and
once with torch.autocast in bfloat16, on the same packed rows in the same order. It uses fused AdamW, gradient clipping,
and a learning rate that rises over the first twentieth of the time and then falls linearly to 0. The time to build and
save it does not count. The same evaluation judges all of them, on every held-out file. Like other plain trainers, it
does not separate the documents of a row during training.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import EXIT_INTERRUPTED, UserError, run_cli
from smallcoder_jax.config import Config
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure
from tools.bench.step_timing import cores
from tools.bench.step_torch import CAUSAL, adamw, build_transformers, check_llama, modules

WARMUP = 0.05  # of the time
LEARNING_RATE = 3e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One trainer and its results."""

    name: str
    steps: int
    tokens: int
    seconds: float
    bits_per_byte: float


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m tools.bench.train_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="config file; --config.key=value overrides a key")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder: ours/, torch/, torch_autocast/")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=LEARNING_RATE,
        help="PyTorch's; default: %(default)s",
    )
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    options = parser.parse_args(arguments)
    config = load_config(options.config, overrides)
    check(config, options.learning_rate)
    if config.train.microbatch_size not in (0, config.train.batch_size):
        raise UserError(f"train.microbatch_size={config.train.microbatch_size}: theirs has none; expected 0")
    if options.workdir.exists():
        raise UserError(f"{options.workdir} exists: the time of a continued run cannot be compared; name a new folder")
    rows = compare(config, options.workdir, options.learning_rate)
    if rows is None:
        return EXIT_INTERRUPTED
    say("\n" + table(rows))
    if options.record:
        benchmarks.record("quickstart", figures(rows, benchmarks.short(config.name), options.learning_rate))
    return 0


def check(config: Config, learning_rate: float) -> None:
    """Raises UserError, before anything is trained, for a config that cannot be compared."""
    check_llama(config, "torch")
    modules("torch", "smallcoder_jax[parity]", "torch", "transformers")
    if not 0 < learning_rate < 1:
        raise UserError(f"--learning-rate={learning_rate}: expected a number above 0 and below 1")
    if config.stage.name != "pretrain" or config.stage.start:
        raise UserError("stage: theirs starts from random parameters and predicts text; give a config without a stage")
    if config.compute.dtype != "float32":
        raise UserError(f"compute.dtype={config.compute.dtype}: expected float32, which theirs has without autocast")
    import jax

    if jax.default_backend() != "cpu":
        raise UserError(f"ours would run on {jax.default_backend()}, theirs on the CPU; set JAX_PLATFORMS=cpu")


def compare(config: Config, workdir: Path, learning_rate: float) -> list[Row] | None:
    """Trains all three, one after the other; None if a signal ended ours."""
    import smallcoder_jax
    from smallcoder_jax.base.progress import Progress
    from smallcoder_jax.run import evaluate_run
    from smallcoder_jax.stages.shared import documents

    prepared = documents.prepare_on_all(config, Progress(sys.stderr))  # for all trainers, before the time starts
    begun = time.monotonic()
    run = smallcoder_jax.train(config, workdir / "ours")
    seconds = time.monotonic() - begun
    if run.interrupted:
        return None
    found = evaluate_run(workdir / "ours", config)["bits_per_byte"]
    rows = [Row("smallcoder_jax", run.step, run.tokens_seen, seconds, found)]
    for name, autocast in (("torch", False), ("torch autocast", True)):
        say(f"\n{name}: training for {seconds:.0f} seconds ...", sys.stderr)
        model, steps, spent = train(config, prepared, seconds, learning_rate, autocast=autocast)
        folder = workdir / name.replace(" ", "_")
        model.save_pretrained(folder)
        shutil.copytree(prepared.tokenizer_folder, folder / "tokenizer")
        tokens = steps * config.train.batch_size * config.train.sequence_length
        rows.append(Row(name, steps, tokens, spent, bits_per_byte(config, folder, prepared)))
    return rows


def train(
    config: Config, prepared: Any, seconds: float, learning_rate: float, *, autocast: bool
) -> tuple[Any, int, float]:
    """Trains transformers' Llama on our rows for `seconds`. Returns the model, its steps, and the seconds."""
    from smallcoder_jax.stages.shared import documents
    from smallcoder_jax.stages.shared.next_token import make_loss

    torch, model, _ = build_transformers(config, CAUSAL)
    torch.set_num_threads(cores())
    model.train()
    optimizer = adamw(torch, model.parameters(), config.optimizer, learning_rate)
    batches = documents.make_task(config, prepared, None, make_loss(config)).train_batches(
        range(config.train.batch_size)
    )
    steps, begun = 0, time.monotonic()
    while (passed := (time.monotonic() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(passed / WARMUP, (1 - passed) / (1 - WARMUP))
        batch = next(batches)
        tokens, targets = (torch.from_numpy(batch[key].astype(np.int64)) for key in ("tokens", "targets"))
        weights = torch.from_numpy(batch["loss_weights"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens).logits
        nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (nll * weights.flatten()).sum() / weights.sum()
        loss.backward()
        if config.optimizer.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps % config.train.log_every == 0:
            say(f"  step {steps}, {passed:.0%} of the time, loss {loss.item():.3f}", sys.stderr)
    spent = time.monotonic() - begun
    batches.close()
    return model, steps, spent


def bits_per_byte(config: Config, folder: Path, prepared: Any) -> float:
    """The bits per byte of a model that transformers saved in `folder`, by the same evaluation as ours."""
    from smallcoder_jax.base.progress import Progress
    from smallcoder_jax.evaluate.sound import check_measures
    from smallcoder_jax.huggingface.read import read_export
    from smallcoder_jax.loading import LoadedModel
    from smallcoder_jax.stages.shared import documents

    export = read_export(folder)
    loaded = LoadedModel(
        model=export.model,
        compute=config.compute,
        params=export.params,
        tokenizer=prepared.tokenizer,
        tokenizer_folder=prepared.tokenizer_folder,
        info={},
        origin={"path": str(folder), "step": None, "hash": ""},
    )
    return check_measures(str(folder), documents.measure(config, loaded, Progress(sys.stderr)))["bits_per_byte"]


def figures(rows: list[Row], name: str, learning_rate: float) -> list[Figure]:
    """The figures to record for each trainer."""
    recorded = []
    for row in rows:
        note = name if row.name == "smallcoder_jax" else f"{name}; AdamW at {learning_rate:g}"
        recorded += [
            Figure(f"{row.name}, equal time: bits per byte", row.bits_per_byte, note=note),
            Figure(f"{row.name}, equal time: steps", row.steps, note=note),
            Figure(f"{row.name}, equal time: seconds", round(row.seconds), "s", note=note),
        ]
    return recorded


def table(rows: list[Row]) -> str:
    """The rows as text."""
    from smallcoder_jax.base.terminal import format_table

    cells = [
        [row.name, f"{row.steps:,}", f"{row.tokens:,}", f"{row.seconds:.0f} s", f"{row.bits_per_byte:.3f}"]
        for row in rows
    ]
    return format_table(["trainer", "steps", "tokens", "time", "bits per byte, held out"], cells)


if __name__ == "__main__":
    run_cli(main)
