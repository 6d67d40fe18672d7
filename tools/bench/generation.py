"""Decoding speed and memory of a config with random weights, compared with generation in PyTorch.

    python -m tools.bench.generation --config=configs/byte_nano.py --against=torch [--check] [--record]

Both continue the same random ids greedily, each in its own processes, in turns (ours, theirs, theirs, ours), on all
cores or the first GPU. Ours is the generator that `tools.generate` and the API use. `torch` is `generate` of
transformers, with its Llama or, for a byte-level model, with the plain PyTorch code of its export. --compile adds
torch.compile. The rate is that of all rows together, from their first token to their last, so it leaves out the prompt
and compilation. Memory is the largest resident set of the process; on a GPU it is the allocator's peak.

--check ends with exit code 3 if ours needs more memory, or reaches less than 5 times theirs with a byte-level model or
less than theirs with a decoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from smallcoder_jax.base.terminal import format_table, human_bytes
from smallcoder_jax.config import Config, HnetConfig, from_config_dict, to_dict
from smallcoder_jax.configfile import load_config, split_overrides
from tools.bench import benchmarks, hnet_torch
from tools.bench.benchmarks import Figure
from tools.bench.step import positive, run_contender, warn_of_company
from tools.bench.step_timing import cores, resident_set
from tools.bench.step_torch import CAUSAL, check_shape, llama_config, modules

WANTED_BYTES_RATIO = 5.0  # of a byte-level model's rate to PyTorch's
LETTERS = 97, 123  # ids of the prompts: small letters, which are text for every tokenizer of bytes
ATTEMPTS = 50  # prompts that are tried
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int | None:
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(arguments)
    config = load_config(options.config, overrides)
    check_options(options, config)
    warn_of_company()
    order = ["ours", *([options.against] if options.against else [])]
    rounds: dict[str, list[Result]] = {name: [] for name in order}
    for number in range(options.rounds):
        for name in order if number % 2 == 0 else reversed(order):
            job = {"name": name, "config": to_dict(config), "compile": options.compile}
            job |= {key: getattr(options, key) for key in ("rows", "prompt", "tokens")}
            rounds[name].append(run_contender(job, sys.executable, module="tools.bench.generation"))
    report = summarise(rounds)
    say(json.dumps(report, indent=1) if options.json else table(report, options))
    if options.record:
        benchmarks.record("generation", figures(report, config, options))
    if options.check:
        check(report, config)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.bench.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="config file; --config.key=value overrides a key")
    parser.add_argument("--against", choices=("torch",), help="measure PyTorch, too")
    parser.add_argument("--rows", type=positive, default=1, help="texts at a time; default: %(default)s")
    parser.add_argument("--prompt", type=positive, default=256, help="tokens of a prompt; default: %(default)s")
    parser.add_argument("--tokens", type=positive, default=256, help="tokens to generate; default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=2, help="processes per contender; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="run theirs with torch.compile")
    parser.add_argument("--check", action="store_true", help="fail if ours misses a limit")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def check_options(options: argparse.Namespace, config: Config) -> None:
    """Raises UserError for a comparison that cannot be made."""
    if options.check and options.against is None:
        raise UserError("--check compares: add --against=torch")
    if options.tokens < 2:
        raise UserError(f"--tokens={options.tokens}: expected at least 2, because the first is not timed")
    if options.prompt + options.tokens > config.model.context:
        raise UserError(f"--prompt and --tokens together must be at most model.context={config.model.context}")
    if options.against:
        check_shape(config, options.against, CAUSAL)


def contend() -> None:
    """The process of a contender: a job as JSON on stdin, its result as the last line on stdout."""
    job = json.load(sys.stdin)
    config = from_config_dict(job["config"])
    measure = measure_ours if job["name"] == "ours" else measure_torch
    run_cli(lambda: say(json.dumps(measure(config, draw_prompts(config.train.seed, job["rows"], job["prompt"]), job))))


def draw_prompts(seed: int, rows: int, length: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(*LETTERS, (rows, length)).tolist()


def measure_ours(config: Config, prompts: list[list[int]], job: Result) -> Result:
    """Measures the project's generator."""
    import jax

    from smallcoder_jax.generate.engine import Generator
    from smallcoder_jax.generate.sampling import SamplingOptions
    from smallcoder_jax.models import build
    from smallcoder_jax.tokenizers.bytes import ByteTokenizer

    params = build.init_params(config.model, config.compute, jax.random.key(config.train.seed))
    generator = Generator(config.model, config.compute, build.to_unrolled(params), ByteTokenizer())
    options = SamplingOptions(max_tokens=job["tokens"], temperature=0.0)
    generator.generate(prompts, options, batch_size=len(prompts))  # compiles
    for attempt in range(1, ATTEMPTS + 1):
        completions = generator.generate(prompts, options, batch_size=len(prompts))
        if all(len(one.token_ids) == job["tokens"] for one in completions):
            break
        # The random model has ended a text. It may not end others.
        prompts = draw_prompts(config.train.seed + attempt, len(prompts), len(prompts[0]))
    else:
        raise UserError("the random model ends every text; take fewer --rows, or another --config.train.seed")
    device = jax.devices()[0]
    return {
        "software": f"smallcoder_jax, jax {jax.__version__}",
        "accelerator": device.platform != "cpu",
        "tokens_per_second": sum(one.tokens_per_second for one in completions),
        "memory": (device.memory_stats() or {}).get("peak_bytes_in_use") or resident_set(),
    }


def measure_torch(config: Config, prompts: list[list[int]], job: Result) -> Result:
    """Measures `generate` of transformers."""
    torch, transformers = modules("torch", "smallcoder_jax[parity]", "torch", "transformers")
    torch.set_num_threads(cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(config.model, HnetConfig):
        model = hnet_torch.build_model(config.model, config.train.seed)
    else:
        torch.manual_seed(config.train.seed)
        model = transformers.LlamaForCausalLM(llama_config(config, transformers, "sdpa")).eval()
    model = model.to(device, getattr(torch, config.compute.dtype))
    if job["compile"]:
        model.forward = torch.compile(model.forward)
    times: list[float] = []

    class Clock(transformers.LogitsProcessor):
        """Notes when the logits of each token have been computed."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return scores

    ids = torch.tensor(prompts, device=device)
    options = {"min_new_tokens": job["tokens"], "max_new_tokens": job["tokens"], "do_sample": False, "use_cache": True}
    options |= {"pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    for _ in range(2):
        times.clear()
        model.generate(ids, logits_processor=transformers.LogitsProcessorList([Clock()]), **options)
    cuda = device.type == "cuda"
    return {
        "software": f"transformers {transformers.__version__}, torch {torch.__version__}"
        + (", compiled" if job["compile"] else ""),
        "accelerator": cuda,
        "tokens_per_second": len(prompts) * (len(times) - 1) / (times[-1] - times[0]),
        "memory": torch.cuda.max_memory_allocated() if cuda else resident_set(),
    }


def summarise(rounds: dict[str, list[Result]]) -> Result:
    """One row per contender over its rounds, and the ratios. Raises UserError if they ran on different hardware."""
    ours, others = rounds["ours"], {name: found for name, found in rounds.items() if name != "ours"}
    for name, found in others.items():
        if found[0]["accelerator"] != ours[0]["accelerator"]:
            raise UserError(f"ours and {name} ran on different hardware; JAX_PLATFORMS and CUDA_VISIBLE_DEVICES choose")
    rows = {
        name: {
            "software": found[0]["software"],
            "tokens_per_second": statistics.median(one["tokens_per_second"] for one in found),
            "memory": max(one["memory"] for one in found),
        }
        for name, found in rounds.items()
    }
    mine = rows["ours"]
    ratios = {name: {key: mine[ours_key] / rows[name][ours_key] for key, ours_key in RATIOS.items()} for name in others}
    return {"contenders": rows, "ratios": ratios, "accelerator": ours[0]["accelerator"]}


RATIOS = {"speed": "tokens_per_second", "memory": "memory"}


def table(report: Result, options: argparse.Namespace) -> str:
    """The report as text."""
    rows = [
        (row["software"], f"{row['tokens_per_second']:,.0f}", human_bytes(row["memory"]))
        for row in report["contenders"].values()
    ]
    rows += [
        (f"ours / {name}", f"{ratio['speed']:.2f}", f"{ratio['memory']:.2f}")
        for name, ratio in report["ratios"].items()
    ]
    title = f"{options.rows} x {options.tokens} tokens after prompts of {options.prompt}, greedy, random weights"
    return "\n".join([title, "", format_table(["", "tokens/s", "memory"], rows)])


def wanted_ratio(config: Config) -> float:
    """The required ratio of our rate to PyTorch's."""
    return WANTED_BYTES_RATIO if isinstance(config.model, HnetConfig) else 1.0


def check(report: Result, config: Config) -> None:
    """Raises CheckFailed if ours is slower, or takes more memory, than required."""
    wanted, failed = wanted_ratio(config), []
    for name, ratio in report["ratios"].items():
        if ratio["speed"] < wanted:
            failed.append(f"{ratio['speed']:.2f} times the tokens per second of {name}; expected {wanted:g} or more")
        if ratio["memory"] > 1:
            failed.append(f"{ratio['memory']:.2f} times the memory of {name}; expected no more")
    if failed:
        raise CheckFailed("; ".join(failed))


def figures(report: Result, config: Config, options: argparse.Namespace) -> list[Figure]:
    """The figures to record for each contender, with the limits of --check."""
    shape = f"{benchmarks.short(config.name)} {options.rows}x{options.prompt}+{options.tokens}"
    theirs, wanted, found = " compiled" if options.compile else "", wanted_ratio(config), []
    for name, row in report["contenders"].items():
        whose = "" if name == "ours" else f"{name}{theirs} "
        tokens, memory = round(row["tokens_per_second"]), round(row["memory"] / 2**20)
        found.append(Figure(f"{shape}: {whose}tokens/s", tokens, note=row["software"]))
        found.append(Figure(f"{shape}: {whose}memory", memory, "MiB", note=row["software"]))
    for name, ratio in report["ratios"].items():
        speed, limit = ratio["speed"], f"≥ {wanted:g}"
        found.append(Figure(f"{shape}: times {name}{theirs}", speed, None, limit, speed >= wanted))
        found.append(Figure(f"{shape}: memory / {name}{theirs}", ratio["memory"], None, "≤ 1", ratio["memory"] <= 1))
    return found


if __name__ == "__main__":
    run_cli(main)
