"""The benchmark of kernels, without a device: its checks, its counts and its table; nothing is timed for its speed."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from smallcoder_jax.base.errors import CheckFailed, UserError
from tests.tools.conftest import Recorded
from tools.bench import attention_jax, attention_torch, benchmarks, packed_rows
from tools.bench import kernels as bench_kernels
from tools.bench.packed_rows import Shape

SHAPE = Shape(2, 96, 24, 4, 2, 16)


@pytest.mark.slow
def test_a_dry_run_checks_numerics_in_both_processes(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["pallas_tpu", "XLA", "splash", "cuDNN", "SDPA", "Flex", "flash-attn"]
    assert bench_kernels.main(["--dry-run", "--check", "--json", "--contenders", *quick]) is None
    report = json.loads(capsys.readouterr().out)
    assert [one.split()[0] for one in report["software"]] == ["jax", "torch"]
    checked = {one["contender"] for one in report["results"] if "errors" in one}
    assert checked == {
        "ours, pallas_tpu",
        "XLA, the reference",
        "jax splash attention",
        "PyTorch SDPA",
        "FlexAttention, document mask",
    }
    for one in report["results"]:
        assert not one["tflops"]
        if one["contender"] == "jax splash attention":  # jax 0.12's loses bits of dq and dk, which the table then says
            assert one["errors"]["output"] <= 2e-2
        elif "errors" in one:
            assert 0 < max(one["errors"].values()) <= 2e-2
        else:
            assert not one["why_not"].startswith("failed")


def test_both_truths_are_the_same() -> None:
    """The reference of the jax side and attention written out on the PyTorch side, output and gradients."""
    import torch

    ours = attention_jax.truth(SHAPE, attention_jax.make_case(SHAPE))
    theirs = attention_torch.truth(torch, SHAPE, attention_torch.make_case(torch, SHAPE, "cpu"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5)


def scaled(factor: float) -> attention_jax.Contender:
    def make(shape: Shape, case: attention_jax.Case) -> attention_jax.Attend:
        def attend(inner: attention_jax.Attend, q: Any, k: Any, v: Any) -> Any:
            return inner(q, k, v) * jnp.asarray(factor, q.dtype)

        return Partial(attend, attention_jax.xla(shape, case))

    return attention_jax.Contender("scaled", (), lambda shape: None, make)


def test_only_what_is_right_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "WINDOW_SECONDS", 0.0)
    case = attention_jax.make_case(SHAPE)
    want = attention_jax.truth(SHAPE, case)
    right = attention_jax.measure(scaled(1.0), SHAPE, case, want, time=True)
    assert set(right["seconds"]) == {"forward", "backward", "both"}
    assert min(right["seconds"].values()) > 0
    wrong = attention_jax.measure(scaled(1.1), SHAPE, case, want, time=True)
    assert min(wrong["errors"].values()) > 2e-2
    assert "seconds" not in wrong
    nan = attention_jax.measure(scaled(float("nan")), SHAPE, case, want, time=True)
    assert "seconds" not in nan


def test_torch_is_timed_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(packed_rows, "WINDOW_SECONDS", 0.0)
    case = attention_torch.make_case(torch, SHAPE, "cpu")
    want = attention_torch.truth(torch, SHAPE, case)
    sdpa = attention_torch.CONTENDERS[0]
    found = attention_torch.measure(torch, sdpa, SHAPE, case, want, time=True)
    assert set(found["seconds"]) == {"forward", "backward", "both"}
    doubled = attention_torch.measure(torch, sdpa, SHAPE, case, [2 * x for x in want], time=True)
    assert "seconds" not in doubled


def test_shapes_are_the_product_without_documents_as_long_as_rows() -> None:
    parse = bench_kernels.build_parser().parse_args
    shapes = bench_kernels.wanted_shapes(parse([]))
    assert len(shapes) == 2 * (5 + 5 + 4 + 3)
    assert {shape.rows * shape.length for shape in shapes} == {32768}
    assert all(shape.mean is None or shape.mean < shape.length for shape in shapes)
    with pytest.raises(UserError, match="positive multiple of --kv-heads=3"):
        bench_kernels.wanted_shapes(parse(["--kv-heads=3"]))
    with pytest.raises(UserError, match="give more"):
        bench_kernels.wanted_shapes(parse(["--tokens=1024"]))


def result(name: str, mean: int | None, milliseconds: float, masks: tuple[str, ...] = ()) -> dict[str, Any]:
    shape = {"rows": 4, "length": 8192, "mean": mean, "heads": 8, "kv_heads": 2, "size": 128}
    seconds = dict.fromkeys(packed_rows.ALL, milliseconds / 1e3)
    errors = dict.fromkeys(packed_rows.GRADIENTS, 1e-3)
    one = {"contender": name, "masks": masks, "shape": shape, "errors": errors, "seconds": seconds}
    return bench_kernels.with_rates(one)


def report_of(*results: dict[str, Any], device: str = "NVIDIA H200") -> dict[str, Any]:
    return {"device": device, "software": ["jax 0"], "results": list(results)}


ALL = packed_rows.ALL
GOOD = (
    result("ours, pallas_gpu", None, 1.0),
    result("cuDNN through jax", None, 1.1, ALL),
    result("ours, pallas_gpu", 2048, 1.0),
    result("cuDNN through jax", 2048, 3.0, ALL),
    result("PyTorch SDPA", 2048, 1.6, ALL),
    result("FlexAttention, document mask", 2048, 0.9),
)


def test_targets_are_held_against_the_same_run() -> None:
    report = report_of(*GOOD)
    found = bench_kernels.targets(report)
    assert [round(one.found / one.at_least, 2) for one in found if one.found and one.at_least] == [1.1, 1.07] * 2
    bench_kernels.check(report, found)
    text = bench_kernels.table(report, found)
    assert text.count("held") == 4
    flops = Shape(4, 8192, None, 8, 2, 128).flops()["forward"]
    assert f"{flops / 1e-3 / 1e12:.0f}" in text
    assert bench_kernels.targets(report_of(*GOOD, device="NVIDIA A100")) == []


MISSING = {
    "contender": "ours, pallas_gpu",
    "shape": GOOD[0]["shape"],
    "why_not": "not here",
    "tflops": {},
    "masks": (),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: result("ours, pallas_gpu", None, 1.2)}, r"one document.*wanted"),
        ({4: result("PyTorch SDPA", 2048, 1.4, ALL)}, r"best masked kernel: 1\.4, wanted 1\.5"),
        ({1: {**GOOD[1], "tflops": {}}}, "wanted not measured"),
        ({0: {**GOOD[0], "errors": {"output": 0.1}}}, "ours is wrong"),
        ({2: {**GOOD[2], "errors": {"output": float("inf")}}}, "ours is wrong"),
        ({0: MISSING}, "ours at .*not here"),
    ],
)  # fmt: skip
def test_check_fails_on_wrong_numbers_and_missed_targets(change: dict[int, dict[str, Any]], words: str) -> None:
    report = report_of(*(change.get(number, one) for number, one in enumerate(GOOD)))
    with pytest.raises(CheckFailed, match=words):
        bench_kernels.check(report, bench_kernels.targets(report))


def test_a_wrong_contender_is_shown_and_not_rated() -> None:
    wrong = {**GOOD[4], "errors": {"output": 0.5}, "tflops": {}}
    assert "WRONG: output 5.0e-01" in bench_kernels.table(report_of(wrong), [])


def test_a_cpu_is_no_place_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="could not run"):
        bench_kernels.main(["--lengths=2048"])


def test_another_python_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="--torch-python"):
        list(bench_kernels.lines_of("tools.bench.attention_torch", "/nowhere/python", {"time": False}))


def test_ours_and_the_best_other_are_recorded_with_the_targets(recorded: Recorded) -> None:
    report = report_of(*GOOD)
    found = bench_kernels.targets(report)
    benchmarks.record("gpu-kernels", bench_kernels.figures(report, found))
    figures = recorded("gpu-kernels")
    ours, theirs = (bench_kernels.rate(report, name, (8192, None, 128), "forward") for name in ("ours", "cuDNN"))
    assert figures["8192/row, head 128: forward"] == (
        pytest.approx(ours, rel=1e-4),
        "TFLOP/s",
        f"≥ {theirs:.4g}",
        True,
    )
    assert figures["8192/2048, head 128: backward, times masked"] == (1.6, None, "≥ 1.5", True)
    assert figures["8192/2048, head 128: backward, best other"][0] > figures["8192/2048, head 128: backward"][0]
    assert figures["8192/row, head 128: both"][1:] == ("TFLOP/s", None, None)
    assert figures["largest relative error"] == (1e-3, None, "≤ 0.02", True)
    lines = benchmarks.read(benchmarks.FOLDER / "gpu-kernels.jsonl")
    notes = {line["figure"]: line["note"] for line in lines}
    assert notes["8192/2048, head 128: both, best other"] == "FlexAttention, document mask"
    assert notes["8192/row, head 128: forward"] == "the aim is 650"


def test_a_dry_run_has_nothing_to_record() -> None:
    with pytest.raises(UserError, match="--dry-run times nothing"):
        bench_kernels.main(["--dry-run", "--record"])
