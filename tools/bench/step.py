"""Training speed and memory of a config on random packed batches, compared with PyTorch trainers.

    python -m tools.bench.step --config=configs/nano.py --against=torch [--check] [--record] [--config.key=value ...]

Each contender runs in its own processes, in turns (ours, theirs, theirs, ours), on all cores or the first GPU. Ours is
the training step that `smallcoder_jax.main` runs. Theirs has the same shape, rows, data type and number of steps, with
gradient clipping and fused AdamW, and is one of

    torch    transformers' LlamaForCausalLM with the loss in the model; for a byte-level model, the plain PyTorch code
             of its export with straight-through gradients (tools/bench/hnet_torch.py)
    litgpt   litgpt's GPT and the loss of its pretraining

--compile adds torch.compile. For float32 configs, --autocast adds the same contender with torch.autocast in bfloat16.
Unlike ours, theirs does not separate the documents of a row, unless --their-attention names one of transformers'
implementations that can (sdpa, flex_attention, flash_attention_2). All train with AdamW, whatever the config says.

Memory is the largest resident set of the process, including libraries and compilation; on a GPU it is the allocator's
peak. MFU counts only the attention between pairs of tokens that causality and documents allow. CPUs have no agreed
peak; there, MFU is relative to the rate of a large matrix product that is measured in the same run.

--profile shows where our step's time goes, operation by operation (tools/bench/op_profile.py).

--check ends with exit code 3 if ours reaches less than 1.2 times PyTorch's tokens per second (1.3 on a GPU, 1.6 where
our products are mixed, 1.25 compared with autocast, 2 for a byte-level model), if it needs more memory than PyTorch, or
if Medium-LC on an H200 stays below its required tokens per second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import EXIT_USER_ERROR, CheckFailed, UserError, run_cli
from smallcoder_jax.base.terminal import format_table, human_bytes, human_time
from smallcoder_jax.config import Config, HnetConfig, from_config_dict, to_dict
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks, op_profile
from tools.bench.benchmarks import Figure
from tools.bench.step_timing import BATCHES, cores, random_batches, resident_set, timed, visible_share
from tools.bench.step_torch import BUILDERS, CAUSAL, check_shape, measure_torch

if TYPE_CHECKING:
    from smallcoder_jax.ops.precision import Kind

WANTED_RATIO, WANTED_GPU_RATIO, WANTED_MIXED_RATIO, WANTED_AUTOCAST_RATIO = 1.2, 1.3, 1.6, 1.25
WANTED_BYTES_RATIO = 2.0
AUTOCAST = " autocast"  # at the end of a contender's name
PRODUCTS = {"float32": "exact", "float32, mixed products": "mixed", "bfloat16": "bf16"}  # in names of figures
DOCUMENTS_PER_ROW = 4  # unless --documents gives their length
# Tokens per second on an H200, required and aimed at, by config and mean length of documents (None: one per row).
H200 = "NVIDIA H200"
H200_TOKENS = {("smallcoder-medium-lc", None): (160_000, 178_000), ("smallcoder-medium-lc", 2048): (230_000, 290_000)}
PROFILED_STEPS = 3
PEAK_SIZE, PEAK_TRIES = 2048, 8  # of the matrix product whose rate counts as a CPU's peak
# glibc's large pages, for both contenders: on a CPU, every step allocates its memory again, page by page.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int | None:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(arguments)
    config = load_config(options.config, overrides)
    documents = documents_of(options.documents, config)
    if options.check and options.against is None and (config.name, documents) not in H200_TOKENS:
        raise UserError("--check compares: add --against=torch")
    configured = config.optimizer.name
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw"))
    if options.autocast and (options.against is None or config.compute.dtype != "float32"):
        raise UserError("--autocast is of --against, and of a float32 config: with bfloat16 theirs is autocast anyway")
    if options.against:
        check_shape(config, options.against, options.their_attention)
    warn_of_company()
    # This process imports neither jax nor torch, because a child's largest resident set starts at its parent's.
    theirs = [options.against] if options.against else []
    order = ["ours", *theirs, *(name + AUTOCAST for name in theirs if options.autocast)]
    rounds: dict[str, list[Result]] = {name: [] for name in order}
    for number in range(options.rounds):
        for name in order if number % 2 == 0 else reversed(order):
            job = {"name": name.removesuffix(AUTOCAST), "steps": options.steps, "documents": documents}
            python = sys.executable if name == "ours" else options.torch_python
            job |= {"attention": options.their_attention, "compile": options.compile, "config": to_dict(config)}
            job |= {"autocast": name.endswith(AUTOCAST), "profile": options.profile and number == 0}
            rounds[name].append(run_contender(job, python))
    report = summarise(rounds, config)
    report["profile"] = rounds["ours"][0]["profile"]
    report["documents"] = documents
    report["optimizer"] = "adamw" if configured == "adamw" else f"adamw (the config says {configured})"
    say(json.dumps(report, indent=1) if options.json else table(report))
    if options.record:
        benchmarks.record("cpu-step" if report["memory_of"] == "process" else "gpu-step", figures(report))
    if options.check:
        check(report)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file; --config.key=value overrides a key")
    parser.add_argument("--against", choices=tuple(BUILDERS), help="measure this trainer, too")
    parser.add_argument("--documents", metavar="row|MEAN", help="one per row, or their mean length; default: 4 per row")
    parser.add_argument("--their-attention", default=CAUSAL, help="default: %(default)s, without documents")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="Python that has their packages, and ml_collections"
    )
    parser.add_argument("--steps", type=positive, default=20, help="timed steps per round; default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=2, help="processes per contender; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="run theirs with torch.compile")
    parser.add_argument("--autocast", action="store_true", help="for float32 configs, also run theirs in bfloat16")
    parser.add_argument("--profile", action="store_true", help="show the most expensive operations of our step")
    parser.add_argument("--check", action="store_true", help="fail if ours misses a limit")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def documents_of(text: str | None, config: Config) -> int | None:
    """The mean length of documents that --documents asks for; None: one per row. Raises UserError on anything else."""
    length = config.train.sequence_length
    if text is None:
        return max(1, length // DOCUMENTS_PER_ROW)
    if text == "row":
        return None
    if not text.isdecimal() or not 1 <= int(text) < length:
        raise UserError(f"--documents={text}: expected row, or a mean length below train.sequence_length={length}")
    return int(text)


def run_contender(
    job: Result,
    python: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    module: str = "tools.bench.step",
) -> Result:
    """Measures one contender by `contend` of a module in a fresh process, with `environment` added to this process's
    environment. Raises UserError if that process fails.
    """
    name, command = job["name"], [python, "-c", f"from {module} import contend; contend()"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**LARGE_PAGES, **os.environ, **environment},
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(f"the benchmark of {name} could not run; its message is above")
    if done.returncode:
        raise UserError(
            f"the process of {name} ended with {done.returncode} (-9: killed, mostly for memory); a smaller "
            "--config.train.microbatch_size or --config.train.sequence_length takes less"
        )
    return json.loads(done.stdout.splitlines()[-1])


def contend() -> None:
    """The process of a contender: a job as JSON on stdin, its result as the last line on stdout."""
    job = json.load(sys.stdin)
    config = from_config_dict(job["config"])

    def measure() -> None:
        name, steps, documents = job["name"], job["steps"], job["documents"]
        if name == "ours":
            result = measure_ours(config, steps, documents, profile=job["profile"])
        else:
            options = {name: job[name] for name in ("attention", "compile", "autocast")}
            result = measure_torch(name, config, steps, documents, **options)
        say(json.dumps(result))

    run_cli(measure)


def measure_ours(config: Config, steps: int, documents: int | None, *, profile: bool) -> Result:
    """Measures the project's training step. With `profile`, runs a few more steps, which are traced."""
    import jax

    from smallcoder_jax.base.runtime import give_back_memory
    from smallcoder_jax.mesh import batch_sharding
    from smallcoder_jax.models.families import family_of
    from smallcoder_jax.stages.shared.next_token import make_loss
    from smallcoder_jax.train.flops import peak_flops
    from smallcoder_jax.train.program import make_program, memory_bytes
    from smallcoder_jax.train.state import init_state

    train = config.train
    program = make_program(config, make_loss(config))
    mesh = program.mesh
    state = jax.jit(lambda: init_state(config, program.optimizer), out_shardings=program.shardings)()
    batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in random_batches(config, documents)]
    start = time.perf_counter()
    compiled = program.step.lower(state, batches[0], {}).compile()
    compile_seconds = time.perf_counter() - start
    give_back_memory()

    def run(number: int) -> float:
        nonlocal state
        state, metrics = compiled(state, batches[number % BATCHES], {})
        return float(metrics["loss"])

    step_seconds, loss = timed(run, steps)
    operations = traced(run, compiled.as_text()) if profile else []
    device = mesh.devices.flat[0]
    on_device = device.memory_stats() or {}
    memory = on_device.get("peak_bytes_in_use") or resident_set()  # before measuring the peak, which takes more
    flops_per_token = family_of(config.model).flops_per_token
    without, whole = (flops_per_token(config.model, length) for length in (0, train.sequence_length))
    known_peak = peak_flops(device.device_kind)
    measured = 0.0 if known_peak else measure_peak(config.compute.dtype, program.matmul.kind)
    return {
        "software": f"smallcoder_jax, jax {jax.__version__}",
        "device": device.device_kind,
        "devices": mesh.devices.size,
        "accelerator": device.platform != "cpu",
        "products": program.matmul.kind,
        "profile": [dataclasses.asdict(row) for row in operations],
        "step_seconds": step_seconds,
        "compile_seconds": compile_seconds,
        "loss": loss,
        "memory": memory,
        "compiled_memory": memory_bytes(compiled),
        "flops_per_token": without + (whole - without) * visible_share(config, documents),
        "peak_flops": known_peak * mesh.devices.size if known_peak else measured,
        "peak_measured": known_peak is None,
    }


def traced(run: Callable[[int], float], program: str) -> list[op_profile.Row]:
    """The operations of a few traced steps."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for number in range(PROFILED_STEPS):
                run(number)
            seconds = time.perf_counter() - start
        return op_profile.rows_of(Path(folder), program, seconds, PROFILED_STEPS)


def measure_peak(dtype: str, kind: Kind) -> float:
    """FLOP/s of one device: the fastest of several large matrix products of this kind."""
    import jax
    import jax.numpy as jnp

    from smallcoder_jax.ops.precision import multiplying, product

    matrix = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE), jnp.dtype(dtype))
    multiply = jax.jit(multiplying(kind, lambda a: product("ij,jk->ik", a, a, a.dtype))).lower(matrix).compile()
    best = float("inf")
    for _ in range(PEAK_TRIES):
        start = time.perf_counter()
        multiply(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * PEAK_SIZE**3 / best


def summarise(rounds: dict[str, list[Result]], config: Config) -> Result:
    """One row per contender over its rounds, and the ratios. Raises UserError if they ran on different hardware."""
    first = {name: results[0] for name, results in rounds.items()}
    ours = first["ours"]
    for name, result in first.items():
        if (result["accelerator"], result["devices"]) != (ours["accelerator"], ours["devices"]):
            raise UserError(
                f"ours ran on {ours['devices']} x {ours['device']}, {name} on {result['devices']} x {result['device']};"
                " compare on one device: CUDA_VISIBLE_DEVICES=0 shows one; with JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES="
                " both use none"
            )
    tokens = config.train.batch_size * config.train.sequence_length
    peak = max(result["peak_flops"] for result in rounds["ours"])
    rows = {}
    for name, results in rounds.items():
        median = statistics.median(seconds for result in results for seconds in result["step_seconds"])
        rows[name] = {
            "software": results[0]["software"],
            "tokens_per_second": tokens / median,
            "mfu": tokens / median * ours["flops_per_token"] / peak,
            "median_step_seconds": median,
            "memory": max(result["memory"] for result in results),
            "loss": results[-1]["loss"],
        }
    report: Result = {
        "name": config.name,
        "parameters": config.model.parameter_count(),
        "batch_size": config.train.batch_size,
        "microbatch_rows": config.train.microbatch_rows,
        "sequence_length": config.train.sequence_length,
        "dtype": config.compute.dtype + (", mixed products" if ours["products"] == "mixed" else ""),
        "device": ours["device"],
        "machine": f"{ours['devices']} x {ours['device']}, {cores()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "glibc_tunables": {**LARGE_PAGES, **os.environ}["GLIBC_TUNABLES"],
        "memory_of": "device" if ours["accelerator"] else "process",
        "peak_flops": peak,
        "peak_measured": ours["peak_measured"],
        "compile_seconds": max(result["compile_seconds"] for result in rounds["ours"]),
        "compiled_memory": ours["compiled_memory"],
        "steps": sum(len(result["step_seconds"]) for result in rounds["ours"]),
        "contenders": rows,
    }
    report["ratios"] = {
        name: {
            "speed": rows["ours"]["tokens_per_second"] / row["tokens_per_second"],
            "memory": rows["ours"]["memory"] / row["memory"],
            "wanted": wanted_ratio(name, ours, config),
        }
        for name, row in rows.items()
        if name != "ours"
    }
    return report


def wanted_ratio(name: str, ours: Result, config: Config) -> float:
    """The required ratio of our speed to that of contender `name`."""
    if isinstance(config.model, HnetConfig):
        return WANTED_BYTES_RATIO
    if ours["accelerator"]:
        return WANTED_GPU_RATIO
    if name.endswith(AUTOCAST):
        return WANTED_AUTOCAST_RATIO
    return WANTED_MIXED_RATIO if ours["products"] == "mixed" else WANTED_RATIO


def table(report: Result) -> str:
    """The report as text."""
    kind = "measured: one large matrix product" if report["peak_measured"] else "data sheet"
    compiled = report["compiled_memory"]
    lines = [
        f"{report['name']}: {report['parameters']:,} parameters, {report['batch_size']} x {report['sequence_length']} "
        f"tokens per step, {report['microbatch_rows']} rows at a time, {report['dtype']}, {report['optimizer']}, "
        + ("one document per row" if report["documents"] is None else f"documents of mean {report['documents']}"),
        f"{report['machine']}, Python {report['python']}; {report['steps']} timed steps each, both with "
        f"GLIBC_TUNABLES={report['glibc_tunables']}",
        f"peak for MFU: {report['peak_flops'] / 1e9:,.0f} GFLOP/s ({kind})",
        f"our compilation: {human_time(report['compile_seconds'])}"
        + (f", {human_bytes(compiled)} by XLA's memory analysis (arguments and temporaries)" if compiled else ""),
    ]
    rows: list[Sequence[object]] = [
        (
            row["software"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
            human_time(row["median_step_seconds"]),
            human_bytes(row["memory"]),
        )
        for row in report["contenders"].values()
    ]
    rows += [
        (f"ours / {name}", f"{ratio['speed']:.2f}", "", "", f"{ratio['memory']:.2f}")
        for name, ratio in report["ratios"].items()
    ]
    if report["profile"]:
        lines += ["", op_profile.table([op_profile.Row(**row) for row in report["profile"]])]
    headers = ["", "tokens/s", "MFU", "step, median", f"memory of the {report['memory_of']}"]
    return "\n".join([*lines, "", format_table(headers, rows)])


def check(report: Result) -> None:
    """Raises CheckFailed if ours is slower, or takes more memory, than required."""
    failed = []
    for name, ratio in report["ratios"].items():
        if ratio["speed"] < ratio["wanted"]:
            failed.append(
                f"{ratio['speed']:.2f} times the tokens per second of {name}; expected {ratio['wanted']} or more"
            )
        if ratio["memory"] > 1:
            failed.append(f"{ratio['memory']:.2f} times the memory of {name}; expected no more")
    if promised := promised_tokens(report):
        found, (least, aim) = report["contenders"]["ours"]["tokens_per_second"], promised
        if found < least:
            failed.append(f"{found:,.0f} tokens per second; expected {least:,} or more, and the aim is {aim:,}")
    elif not report["ratios"]:
        failed.append(f"nothing to compare with: tokens per second are required of an H200, not of {report['device']}")
    if failed:
        raise CheckFailed("; ".join(failed))


def promised_tokens(report: Result) -> tuple[int, int] | None:
    """Required and aimed-at tokens per second of this device; None if there are none."""
    on_h200 = report["device"].startswith(H200)
    return H200_TOKENS.get((report["name"], report["documents"])) if on_h200 else None


def figures(report: Result) -> list[Figure]:
    """The figures to record for each contender, with the limits of --check."""
    rows = f"{report['batch_size']}x{report['sequence_length']}/{report['documents'] or 'row'}"
    step = f"{benchmarks.short(report['name'])} {rows} {PRODUCTS.get(report['dtype'], report['dtype'])}"
    found = []
    for name, row in report["contenders"].items():
        whose = "" if name == "ours" else f"{name} "
        promised = promised_tokens(report) if name == "ours" else None
        tokens, note = row["tokens_per_second"], row["software"]
        if promised:
            least, aim = promised
            limit = f"≥ {least:,}", tokens >= least, f"{note}; the aim is {aim:,}"
        else:
            limit = None, None, note
        found.append(Figure(f"{step}: {whose}tokens/s", round(tokens), None, *limit))
        found.append(Figure(f"{step}: {whose}memory", round(row["memory"] / 2**20), "MiB", note=note))
    peak = f"of {report['peak_flops'] / 1e9:,.0f} GFLOP/s"
    found.append(Figure(f"{step}: MFU", 100 * report["contenders"]["ours"]["mfu"], "%", note=peak))
    for name, ratio in report["ratios"].items():
        speed, memory, wanted = ratio["speed"], ratio["memory"], ratio["wanted"]
        found.append(Figure(f"{step}: times {name}", speed, None, f"≥ {wanted}", speed >= wanted))
        found.append(Figure(f"{step}: memory / {name}", memory, None, "≤ 1", memory <= 1))
    return found


def warn_of_company() -> None:
    """Warns on stderr if other programs use the cores: PyTorch's threads then wait for each other more than ours do."""
    busy = os.getloadavg()[0]
    if busy > cores() / 4:
        say(
            f"warning: the load average is {busy:.1f} on {cores()} cores; figures that are measured while "
            "other programs run are not reliable",
            sys.stderr,
        )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
