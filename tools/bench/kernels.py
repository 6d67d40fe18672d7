"""Compares our attention with RoPE, forward and backward, with other implementations: numerics first, then times.

    python -m tools.bench.kernels [--lengths 2048 8192] [--means one 2048] [--sizes 128] [--check]
        [--record] [--dry-run]

The measured time of every contender includes the rotation of queries and keys, from the same tables of angles. Whatever
a batch needs only once for all layers (masks, offsets, block masks) is made before. Rows consist of one document, or of
documents with log-normally distributed lengths, which are the same in every run. TFLOP/s count useful work: for each
pair of tokens that causality and documents allow, 4 FLOPs per head dimension forward and 10 backward. Additional work
of a kernel does not count.

Results are compared with the reference in float32 (jax), or with attention written out (PyTorch). A contender is timed
only if the relative errors of the output and of all three gradients are at most 2e-2. The jax contenders run in one
process and the PyTorch contenders in another, which may have a separate environment (--torch-python), because both
bring CUDA libraries.

--dry-run does everything except timing, on a CPU, with tiny shapes and interpreted Pallas kernels. --check ends with
exit code 3 if ours is wrong or missing, or if a figure on an H200 is below its target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import EXIT_USER_ERROR, CheckFailed, UserError, run_cli
from smallcoder_jax.base.terminal import format_table
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure
from tools.bench.packed_rows import ALL, BOUND, Shape

ROOT = Path(__file__).resolve().parents[2]
LENGTHS, MEANS, SIZES = (2048, 4096, 8192, 16384, 32768), (None, 1024, 2048, 4096), (128, 64)
DRY_SHAPES = [Shape(1, 128, None, 2, 1, 128), Shape(1, 256, 64, 2, 1, 64)]
OURS, CUDNN = "ours", "cuDNN through jax"
TARGET_DEVICE = "NVIDIA H200"
AIMS = {"forward": 650, "backward": 550}  # TFLOP/s, one document
MASKED_RATIO, MASKED_AIM = 1.5, 2.5  # speed relative to the best masked kernel, for documents of mean 2048
Result = dict[str, Any]


class Target(NamedTuple):
    """A figure of ours and its target. `found` is None if the figure, or the one it is compared with, is missing."""

    what: str
    found: float | None
    at_least: float | None
    aim: float
    figure: str  # its name as a recorded figure

    @property
    def missed(self) -> bool:
        return self.found is None or self.at_least is None or self.found < self.at_least


def main(argv: list[str] | None = None) -> int | None:
    options = build_parser().parse_args(argv)
    if options.record and options.dry_run:
        raise UserError("--record is of figures, and --dry-run times nothing; leave one of them out")
    shapes = DRY_SHAPES if options.dry_run else wanted_shapes(options)
    job = {
        "shapes": [dataclasses.asdict(shape) for shape in shapes],
        "contenders": options.contenders,
        "time": not options.dry_run,
    }
    results, software = [], []
    for module, python in (
        ("tools.bench.attention_jax", sys.executable),
        ("tools.bench.attention_torch", options.torch_python),
    ):
        for line in lines_of(module, python, job):
            if "contender" in line:
                results.append(line)
                say(progress(line), sys.stderr)
            else:
                software.append(line)
    report: Result = {
        "device": software[0]["device"],
        "software": [line["software"] for line in software],
        "results": [with_rates(result) for result in results],
    }
    found = targets(report)
    report["targets"] = [{**target._asdict(), "missed": target.missed} for target in found]
    say(json.dumps(report, indent=1) if options.json else table(report, found))
    if options.record:
        benchmarks.record("gpu-kernels", figures(report, found))
    if options.check:
        check(report, found)
    return None


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens per row")
    parser.add_argument(
        "--means", type=_mean, nargs="+", default=MEANS, help="mean lengths of documents, or: one (per row)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="head sizes")
    parser.add_argument("--heads", type=int, default=8, help="query heads; default: %(default)s")
    parser.add_argument("--kv-heads", type=int, default=2, help="key heads; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of all rows together; default: %(default)s")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="WORD", help="those with a word in their names")
    parser.add_argument("--torch-python", default=sys.executable, help="Python with torch and numpy; default: this one")
    parser.add_argument("--dry-run", action="store_true", help="check numerics at tiny shapes on a CPU, untimed")
    parser.add_argument("--check", action="store_true", help="fail if ours is wrong, or below a target on an H200")
    parser.add_argument("--record", action="store_true", help=benchmarks.RECORD_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def wanted_shapes(options: argparse.Namespace) -> list[Shape]:
    """All combinations of the options in which documents are shorter than rows. Raises UserError for invalid
    options."""
    if options.kv_heads < 1 or options.heads < options.kv_heads or options.heads % options.kv_heads:
        raise UserError(f"--heads={options.heads} is to be a positive multiple of --kv-heads={options.kv_heads}")
    for name in ("lengths", "sizes"):
        if min(getattr(options, name)) < 2:
            raise UserError(f"--{name} {min(getattr(options, name))}: expected 2 or more")
    if options.tokens < max(options.lengths):
        raise UserError(f"--tokens={options.tokens} are fewer than a row of {max(options.lengths)}; give more")
    return [
        Shape(options.tokens // length, length, mean, options.heads, options.kv_heads, size)
        for size in options.sizes
        for mean in options.means
        for length in options.lengths
        if mean is None or mean < length
    ]


def lines_of(module: str, python: str, job: Result) -> Iterator[Result]:
    """The lines that the process of one side prints. Raises UserError if it cannot run."""
    environment = dict(os.environ)
    if not job["time"]:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        process = subprocess.Popen(
            [python, "-m", module], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise UserError(
            f"{python} cannot be run ({error.strerror}); --torch-python names a Python with torch"
        ) from error
    assert process.stdin
    assert process.stdout
    with process:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode == EXIT_USER_ERROR:
        raise UserError(f"{module} could not run; its message is above")
    if process.returncode:
        raise UserError(
            f"{module} ended with {process.returncode}; what it measured is above. Use --contenders to exclude one "
            "that crashes the process"
        )


def with_rates(result: Result) -> Result:
    """Adds TFLOP/s of useful work for every pass that was timed."""
    flops = Shape(**result["shape"]).flops()
    seconds = result.get("seconds", {})
    return {**result, "tflops": {name: flops[name] / taken / 1e12 for name, taken in seconds.items()}}


def progress(result: Result) -> str:
    shape = Shape(**result["shape"])
    state = result.get("why_not") or f"error {max(result['errors'].values()):.1e}"
    return f"{shape.length} tokens, documents: {shape.documents}, head {shape.size}: {result['contender']}: {state}"


def rate(report: Result, name: str, shape: tuple[int, int | None, int], part: str) -> float | None:
    """The best TFLOP/s of the contenders whose name starts with `name`, at the shape (length, mean, head size)."""
    found = [
        result["tflops"][part]
        for result in report["results"]
        if result["contender"].startswith(name)
        and shape == (result["shape"]["length"], result["shape"]["mean"], result["shape"]["size"])
        and part in result["tflops"]
    ]
    return max(found, default=None)


def targets(report: Result) -> list[Target]:
    """The targets for an H200 at the measured shapes; none on other devices."""
    if not report["device"].startswith(TARGET_DEVICE):
        return []
    measured = {(one["shape"]["length"], one["shape"]["mean"], one["shape"]["size"]) for one in report["results"]}
    found = []
    for part, aim in AIMS.items():
        one_document = (8192, None, 128)
        if one_document in measured:
            ours, theirs = (rate(report, name, one_document, part) for name in (OURS, CUDNN))
            what = f"one document, 8192, head 128, {part}, TFLOP/s (cuDNN's)"
            found.append(Target(what, ours, theirs, aim, f"{shape_name(*one_document)}: {part}"))
        packed = (8192, 2048, 128)
        if packed in measured:
            masked = [
                rate(report, one["contender"], packed, part) or 0.0 for one in report["results"] if part in one["masks"]
            ]
            best, ours = max(masked, default=0.0), rate(report, OURS, packed, part)
            ratio = ours / best if ours and best else None
            what = f"documents of mean 2048, 8192, head 128, {part}, times the best masked kernel"
            figure = f"{shape_name(*packed)}: {part}, times masked"
            found.append(Target(what, ratio, MASKED_RATIO, MASKED_AIM, figure))
    return found


def shape_name(length: int, mean: int | None, size: int) -> str:
    """The name of a shape in figures: length of a row / mean length of documents, head size."""
    return f"{length}/{mean or 'row'}, head {size}"


def figures(report: Result, found: Sequence[Target]) -> list[Figure]:
    """The figures to record: TFLOP/s of ours and of the best other contender at each timed shape, the largest error of
    ours, and the ratios that have targets, each with its target.
    """
    wanted = {target.figure: target for target in found if target.found is not None}
    shapes = [(one["shape"]["length"], one["shape"]["mean"], one["shape"]["size"]) for one in report["results"]]
    recorded = []
    for shape in dict.fromkeys(shapes):
        here = [one for one, its in zip(report["results"], shapes, strict=True) if its == shape]
        for part in ALL:
            name = f"{shape_name(*shape)}: {part}"
            timed = {one["contender"]: one["tflops"][part] for one in here if part in one["tflops"]}
            others = [other for other in timed if not other.startswith(OURS)]
            if (ours := rate(report, OURS, shape, part)) is not None:
                recorded.append(_figure(name, ours, "TFLOP/s", wanted.pop(name, None)))
            if others:
                best = max(others, key=timed.__getitem__)
                recorded.append(Figure(f"{name}, best other", timed[best], "TFLOP/s", note=best))
    errors = [
        max(one["errors"].values())
        for one in report["results"]
        if one["contender"].startswith(OURS) and "errors" in one
    ]
    if errors:
        recorded.append(Figure("largest relative error", max(errors), None, f"≤ {BOUND:g}", max(errors) <= BOUND))
    return recorded + [_figure(name, target.found or 0.0, None, target) for name, target in wanted.items()]


def _figure(name: str, value: float, unit: str | None, target: Target | None) -> Figure:
    if target is None or target.at_least is None:
        return Figure(name, value, unit)
    limit = f"≥ {target.at_least:.4g}"
    return Figure(name, value, unit, limit, not target.missed, f"the aim is {target.aim:g}")


def table(report: Result, found: Sequence[Target]) -> str:
    """The report as text."""
    rows: list[Sequence[object]] = []
    for result in report["results"]:
        shape = Shape(**result["shape"])
        error = max(result["errors"].values()) if "errors" in result else None
        note = result.get("why_not") or result.get("no_backward") or ""
        if error is not None and error > BOUND:
            note = "WRONG: " + ", ".join(f"{name} {value:.1e}" for name, value in result["errors"].items())
        cells = [f"{result['tflops'][part]:.0f}" if part in result["tflops"] else "-" for part in ALL]
        both = result.get("seconds", {}).get("both")
        cells += [f"{both * 1e3:.3f}" if both else "-", note]
        named = (shape.size, shape.documents, shape.length, result["contender"])
        rows.append((*named, "-" if error is None else f"{error:.1e}", *cells))
    headers = ["head", "documents", "length", "contender", "error", *ALL, "both, ms", "note"]
    lines = [
        f"{report['device']}; {', '.join(report['software'])}; TFLOP/s of useful work, RoPE included",
        "",
        format_table(headers, rows),
    ]
    if found:
        cells = [
            (one.what, _number(one.found), _number(one.at_least), one.aim, "MISSED" if one.missed else "held")
            for one in found
        ]
        lines += ["", format_table(["target", "found", "at least", "aim", ""], cells)]
    return "\n".join(lines)


def check(report: Result, found: Sequence[Target]) -> None:
    """Raises CheckFailed if ours is wrong or missing at a shape, or if a target is missed."""
    failed = []
    ours = [result for result in report["results"] if result["contender"].startswith(OURS)]
    for shape in {json.dumps(result["shape"]) for result in report["results"]}:
        here = [result for result in ours if json.dumps(result["shape"]) == shape]
        good = [one for one in here if "errors" in one and max(one["errors"].values()) <= BOUND]
        if not good:
            reasons = "; ".join(one.get("why_not") or f"errors {one['errors']}" for one in here) or "not asked for"
            failed.append(f"ours at {shape}: {reasons}")
        failed += [f"ours is wrong at {shape}: {one['errors']}" for one in here if "errors" in one and one not in good]
    failed += [f"{one.what}: {_number(one.found)}, wanted {_number(one.at_least)}" for one in found if one.missed]
    if failed:
        raise CheckFailed("; ".join(failed))


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _mean(text: str) -> int | None:
    if text == "one":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of tokens, or one")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
