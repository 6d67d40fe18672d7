"""Names of topologies: a wrong one is told the nearest that is right, a missing compiler what to install."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.preflight.target import CHIPS, Target, target_of
from smallcoder_jax.train.flops import peak_flops


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5e:16x15", "did you mean 'v5e:16x16'?"),
        ("v5e:32x32", "did you mean 'v5e:16x16'?"),
        ("2xv5e:16x15", "did you mean 'v5e:16x16'?"),
        ("2xh200:1x8", "did you mean 'h200'?"),
        ("0xv5e:4x4", "did you mean 'v5e'?"),
        ("v5e", "did you mean 'v5e:1x1'?"),
        ("v5p:4x4", "did you mean 'v5p:2x2x4'?"),
        ("v5e-256", "did you mean 'v5e'? known are cpu and v5e:4x4"),
        ("v5d:4x4", "did you mean 'v5"),
        ("h200:8", "did you mean 'h200:1x8'?"),
        ("H200:1x8", "did you mean 'h200'?"),
        ("gpu", "did you mean 'cpu'?"),
        ("", "known are cpu and v5e:4x4, v6e:4x4, v5p:2x2x4, h200:1x8"),
        ("cpu:", "known are"),
    ],
)
def test_a_name_that_is_not_known(name: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        target_of(name)
    assert f"--topology={name}: " in str(refused.value)
    assert hint in str(refused.value)


@pytest.mark.parametrize(("name", "package", "extra"), [("v5e:4x4", "libtpu", "tpu"), ("h200:1x8", "GPUs", "cuda")])
def test_a_compiler_that_is_not_installed(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install -e '.\\[{extra}\\]'") as refused:
        target_of(name)
    assert package in str(refused.value)


def test_the_cpu_is_this_machine() -> None:
    target = target_of("cpu")
    assert target.devices == jax.devices()
    assert 2**28 < target.memory < 2**50
    assert target.chip is None


def test_every_chip_has_a_peak_rate() -> None:
    kinds = ["TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H200 141GB HBM3e"]

    class Device:
        def __init__(self, kind: str):
            self.device_kind = kind

    found = [Target("", [Device(kind)], 0.0, "").chip for kind in kinds]
    assert found == list(CHIPS.values())
    assert all(peak_flops(kind) for kind in kinds)
