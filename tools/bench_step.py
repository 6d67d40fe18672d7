"""Training speed and memory of a config on random packed batches, beside transformers with PyTorch.

    python -m tools.bench_step --config=configs/nano.py --against=torch [--check] [--config.key=value ...]

Each contender runs in processes of its own, in turns (ours, theirs, theirs, ours), on all cores or the first GPU. Ours
is the training step that `smallcoder_jax.main` runs. Theirs is LlamaForCausalLM of the same shape with causal sdpa
attention, the loss in the model, gradient clipping and fused AdamW: the same rows, type and number of steps. It does
not keep the documents of a row apart, which ours does. Both train with AdamW, whatever the config says.

Memory is the largest resident set of the process, libraries and compilation included; on a GPU, the most that the
allocator handed out. MFU counts causal attention once; on a CPU, which has no agreed peak, it is a share of the rate of
one large matrix product measured in the same run.

--check ends with exit code 3 below 1.2 times PyTorch's tokens per second, or above its memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.config import Config, from_config_dict, parameter_count, to_dict
from smallcoder_jax.configfile import load_config, split_overrides
from smallcoder_jax.errors import EXIT_USER_ERROR, CheckFailed, UserError, run_cli
from smallcoder_jax.train.terminal import format_table, human_bytes, human_time

WANTED_RATIO = 1.2
WARMUP_STEPS = 2  # not timed
BATCHES = 4  # different ones, in turns
DOCUMENTS_PER_ROW = 4
PEAK_SIZE, PEAK_TRIES = 2048, 8  # of the matrix product that stands for a CPU's peak
LLAMA = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "dropout": 0.0, "window": 0}
# glibc's large pages, for both: on a CPU, the memory of a step is taken anew for every step, page by page.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int | None:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(arguments)
    if options.check and options.against is None:
        raise UserError("--check compares: add --against=torch")
    config = load_config(options.config, overrides)
    configured = config.optimizer.name
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw"))
    if options.against:
        check_llama(config)
    warn_of_company()
    # This process imports neither jax nor torch: a child's largest resident set starts at that of its parent.
    order = [name for name in ("ours", options.against) if name]
    rounds: dict[str, list[Result]] = {name: [] for name in order}
    for number in range(options.rounds):
        for name in order if number % 2 == 0 else reversed(order):
            rounds[name].append(run_contender(name, config, options.steps, options.compile))
    report = summarise(rounds, config)
    report["optimizer"] = "adamw" if configured == "adamw" else f"adamw (the config says {configured})"
    print(json.dumps(report, indent=1) if options.json else table(report))
    if options.check:
        check(report)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file; --config.key=value overrides a key")
    parser.add_argument("--against", choices=("torch",), help="measure this beside ours")
    parser.add_argument("--steps", type=_positive, default=20, help="timed steps per round; default: %(default)s")
    parser.add_argument("--rounds", type=_positive, default=2, help="processes per contender; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="PyTorch with torch.compile")
    parser.add_argument("--check", action="store_true", help=f"fail below {WANTED_RATIO} times, or above its memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def run_contender(name: str, config: Config, steps: int, compile_torch: bool) -> Result:
    """Measures one contender in a fresh process. Raises UserError where that process fails."""
    job = {"name": name, "config": to_dict(config), "steps": steps, "compile_torch": compile_torch}
    command = [sys.executable, "-c", "from tools.bench_step import contend; contend()"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**LARGE_PAGES, **os.environ},
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
        if job["name"] == "ours":
            result = measure_ours(config, job["steps"])
        else:
            result = measure_torch(config, job["steps"], job["compile_torch"])
        print(json.dumps(result))

    run_cli(measure)


def measure_ours(config: Config, steps: int) -> Result:
    """Runs the project's training step."""
    import jax

    from smallcoder_jax import optim
    from smallcoder_jax.mesh import batch_sharding, make_mesh
    from smallcoder_jax.models.build import flops_per_token
    from smallcoder_jax.runtime import give_back_memory
    from smallcoder_jax.stages.pretrain import make_loss
    from smallcoder_jax.train.flops import peak_flops
    from smallcoder_jax.train.state import init_state, state_sharding
    from smallcoder_jax.train.step import make_train_step

    train = config.train
    mesh = make_mesh(config.mesh, config.model, train.microbatch_rows)
    optimizer = optim.make_optimizer(config.optimizer, train.steps)
    shardings = state_sharding(mesh, jax.eval_shape(lambda: init_state(config, optimizer)))
    state = jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings)()
    step = make_train_step(
        make_loss(config),
        optimizer,
        optim.schedule(config.optimizer, train.steps),
        peak=config.optimizer.learning_rate,
        microbatches=train.batch_size // train.microbatch_rows,
        mesh=mesh,
        shardings=shardings,
    )
    batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in random_batches(config)]
    start = time.perf_counter()
    compiled = step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - start
    give_back_memory()

    def run(number: int) -> float:
        nonlocal state
        state, metrics = compiled(state, batches[number % BATCHES])
        return float(metrics["loss"])

    step_seconds, loss = timed(run, steps)
    device = mesh.devices.flat[0]
    analysis = compiled.memory_analysis()
    on_device = device.memory_stats() or {}
    memory = on_device.get("peak_bytes_in_use") or resident_set()  # before the peak is measured, which takes more
    known_peak = peak_flops(device.device_kind)
    return {
        "software": f"smallcoder_jax, jax {jax.__version__}",
        "device": device.device_kind,
        "devices": mesh.devices.size,
        "accelerator": device.platform != "cpu",
        "step_seconds": step_seconds,
        "compile_seconds": compile_seconds,
        "loss": loss,
        "memory": memory,
        "compiled_memory": analysis
        and analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes,
        "flops_per_token": flops_per_token(config.model, train.sequence_length),
        "peak_flops": known_peak * mesh.devices.size if known_peak else measure_peak(config.compute.dtype),
        "peak_measured": known_peak is None,
    }


def measure_torch(config: Config, steps: int, compile_torch: bool) -> Result:
    """Runs the same shape in transformers and PyTorch. Raises UserError where they are not installed."""
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"--against=torch needs {error.name}; run: pip install 'smallcoder_jax[parity]'") from error
    torch.set_num_threads(cores())
    torch.manual_seed(config.train.seed)
    train, settings = config.train, config.optimizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers.LlamaForCausalLM(llama_config(config, transformers)).to(device).train()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    if count != parameter_count(config.model):
        raise UserError(f"PyTorch's model has {count:,} parameters, ours {parameter_count(config.model):,}")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        fused=True,
    )
    forward = torch.compile(model) if compile_torch else model
    batches = [torch.from_numpy(batch["tokens"].astype(np.int64)).to(device) for batch in random_batches(config)]
    parts = train.batch_size // train.microbatch_rows
    half = config.compute.dtype == "bfloat16"

    def run(number: int) -> float:
        total = 0.0
        for ids in batches[number % BATCHES].split(train.microbatch_rows):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = forward(input_ids=ids, labels=ids).loss / parts
            loss.backward()
            total += loss.detach()
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    step_seconds, loss = timed(run, steps)
    accelerator = device.type == "cuda"
    return {
        "software": f"transformers {transformers.__version__}, torch {torch.__version__}"
        + (", compiled" if compile_torch else ""),
        "device": torch.cuda.get_device_name() if accelerator else "cpu",
        "devices": 1,
        "accelerator": accelerator,
        "step_seconds": step_seconds,
        "loss": loss,
        "memory": torch.cuda.max_memory_allocated() if accelerator else resident_set(),
    }


def llama_config(config: Config, transformers: Any) -> Any:
    """The transformers configuration of our shape."""
    model = config.model
    return transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        max_position_embeddings=model.context,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.embeddings == "tied",
        attention_bias=model.bias == "all",
        mlp_bias=model.bias == "all",
        attn_implementation="sdpa",
        use_cache=False,
    )


def check_llama(config: Config) -> None:
    """Raises UserError for a model that LlamaForCausalLM does not compute."""
    differing = [
        f"model.{name}={getattr(config.model, name)!r} instead of {wanted!r}"
        for name, wanted in LLAMA.items()
        if getattr(config.model, name) != wanted
    ]
    if differing:
        raise UserError(f"--against=torch compares with Llama, which this config is not: {', '.join(differing)}")


def random_batches(config: Config) -> list[dict[str, np.ndarray]]:
    """Full rows of random tokens, each of several documents of random lengths; the same for both contenders."""
    generator = np.random.default_rng(config.train.seed)
    shape = (config.train.batch_size, config.train.sequence_length)
    batches = []
    for _ in range(BATCHES):
        ids = generator.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
        starts = generator.random(shape) < (DOCUMENTS_PER_ROW - 1) / shape[1]
        starts[:, 0] = True
        places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        batches.append(
            {
                "tokens": ids[:, :-1],
                "targets": ids[:, 1:],
                "positions": places - first,
                "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
                "loss_weights": np.ones(shape, np.float32),
            }
        )
    return batches


def timed(run: Callable[[int], float], steps: int) -> tuple[list[float], float]:
    """Seconds of each of `steps` steps, and the last one's loss. `run` returns when its step is done."""
    seconds, loss = [], 0.0
    for number in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        loss = run(number)
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:], loss


def measure_peak(dtype: str) -> float:
    """FLOP/s of the fastest of several large matrix products on one device."""
    import jax
    import jax.numpy as jnp

    from smallcoder_jax.ops.precision import matmul_precision

    matrix = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=matmul_precision(dtype))).lower(matrix).compile()
    best = float("inf")
    for _ in range(PEAK_TRIES):
        start = time.perf_counter()
        multiply(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * PEAK_SIZE**3 / best


def summarise(rounds: dict[str, list[Result]], config: Config) -> Result:
    """One row per contender over its rounds, and the ratios. Raises UserError where they ran on unlike hardware."""
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
        "parameters": parameter_count(config.model),
        "batch_size": config.train.batch_size,
        "microbatch_rows": config.train.microbatch_rows,
        "sequence_length": config.train.sequence_length,
        "dtype": config.compute.dtype,
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
    for name in rows.keys() - {"ours"}:
        report["speed_ratio"] = rows["ours"]["tokens_per_second"] / rows[name]["tokens_per_second"]
        report["memory_ratio"] = rows["ours"]["memory"] / rows[name]["memory"]
    return report


def table(report: Result) -> str:
    """The report as text."""
    kind = "measured: one large matrix product" if report["peak_measured"] else "data sheet"
    compiled = report["compiled_memory"]
    lines = [
        f"{report['name']}: {report['parameters']:,} parameters, {report['batch_size']} x {report['sequence_length']} "
        f"tokens per step, {report['microbatch_rows']} rows at a time, {report['dtype']}, {report['optimizer']}",
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
    if "speed_ratio" in report:
        rows.append(("ours / theirs", f"{report['speed_ratio']:.2f}", "", "", f"{report['memory_ratio']:.2f}"))
    headers = ["", "tokens/s", "MFU", "step, median", f"memory of the {report['memory_of']}"]
    return "\n".join([*lines, "", format_table(headers, rows)])


def check(report: Result) -> None:
    """Raises CheckFailed where ours is not as fast, or takes more memory, than promised."""
    failed = []
    if report["speed_ratio"] < WANTED_RATIO:
        failed.append(f"{report['speed_ratio']:.2f} times PyTorch's tokens per second; expected {WANTED_RATIO} or more")
    if report["memory_ratio"] > 1:
        failed.append(f"{report['memory_ratio']:.2f} times PyTorch's memory; expected no more than it takes")
    if failed:
        raise CheckFailed("; ".join(failed))


def warn_of_company() -> None:
    """Says on stderr when other programs take the cores: PyTorch's threads then wait for one another, and ours less."""
    busy = os.getloadavg()[0]
    if busy > cores() / 4:
        print(
            f"warning: the load average is {busy:.1f} on {cores()} cores; figures taken beside other programs are not "
            "to be relied on",
            file=sys.stderr,
        )


def resident_set() -> int:
    """Bytes of the largest resident set that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, the others in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
