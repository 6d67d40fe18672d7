"""What the tuner tries, refuses, chooses and writes. Times are made up: nothing here is measured."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.kernels import tile_table
from smallcoder_jax.kernels.tiles import HopperTiles, TpuTiles
from tools.bench import attention_jax, tune_kernels
from tools.bench.tune_kernels import Outcome, Wanted

TPU, GPU = attention_jax.KERNELS
SMALL = Wanted(256, 2, 16)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiles_table.json"
    path.write_text("[]\n")
    monkeypatch.setattr(tile_table, "TABLE", path)
    tile_table.read_table.cache_clear()
    yield path
    tile_table.read_table.cache_clear()


def outcome(total: float, problem: str | None = None) -> Outcome:
    return Outcome(TpuTiles(), {} if problem else {"forward": total / 2, "backward": total / 2}, None, problem)


def test_the_least_time_that_is_right_is_chosen() -> None:
    best = outcome(2.0)
    assert tune_kernels.choose([outcome(3.0), outcome(0.0, "wrong"), best, outcome(2.5)]) is best


@pytest.mark.parametrize("outcomes", [[], [outcome(0.0, "wrong"), outcome(0.0, "failed: too much memory")]])
def test_nothing_is_chosen_where_nothing_is_right(outcomes: list[Outcome]) -> None:
    with pytest.raises(CheckFailed, match="no tiles can be chosen"):
        tune_kernels.choose(outcomes)


def test_candidates_are_what_the_class_allows_rows_fill_and_the_kernel_takes() -> None:
    (values,) = tune_kernels.VALUES[TpuTiles]
    found = list(tune_kernels.candidates(TPU, Wanted(2048, 4, 128), "TPU v6 lite", values, TpuTiles()))
    assert all(max(one.block_q, one.block_kv) <= 2048 for one, _ in found)
    assert (TpuTiles(512, 1024), None) in found
    refused = {one: reason for one, reason in found if reason}
    assert "VMEM" in refused[TpuTiles(2048, 2048)]
    hopper = [
        one
        for values in tune_kernels.VALUES[HopperTiles]
        for one, reason in tune_kernels.candidates(GPU, Wanted(2048, 4, 128), "NVIDIA H200", values, HopperTiles())
        if reason is None
    ]
    assert len(hopper) > 9
    assert len({(one.dq_block_kv, one.dq_stages) for one in hopper}) > 1


def fake_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks of queries and large ones of keys are fast."""

    attend, chosen = attention_jax.Kernel.attend, []

    def noted(kernel: Any, case: Any, tiles: Any, interpret: bool) -> Any:
        chosen.append(tiles)
        return attend(kernel, case, tiles, interpret)

    def times(attend: Any, case: Any) -> dict[str, float]:
        tiles = chosen[-1]
        return {"forward": tiles.block_q * 1e-6, "backward": 1e-3 / tiles.block_kv, "both": 1.0}

    monkeypatch.setattr(attention_jax.Kernel, "attend", noted)
    monkeypatch.setattr(attention_jax, "times", times)
    monkeypatch.setattr(tune_kernels, "TOKENS", 256)


def test_the_interpreted_kernel_is_tuned_and_written(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_times(monkeypatch)
    monkeypatch.setitem(tune_kernels.VALUES, TpuTiles, [{"block_q": (128, 256), "block_kv": (128, 256, 100)}])
    tune_kernels.tune(TPU, SMALL, "TPU v6 lite", interpret=True)
    (entry,) = json.loads(table.read_text())
    assert entry["tiles"] == {"block_q": 128, "block_kv": 256}
    assert entry["measured"]["microseconds"]["packed, forward"] == 128.0
    assert tile_table.lookup(TpuTiles, "TPU v6 lite", 16, 2, 256).tuned
    table_shown = capsys.readouterr().out
    assert table_shown.index("block_q=128, block_kv=256") < table_shown.index("block_q=256, block_kv=256")


def test_wrong_numerics_are_never_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch)
    monkeypatch.setitem(tune_kernels.VALUES, TpuTiles, [{"block_q": (128, 256, 512), "block_kv": (256,)}])

    def broken(q: Any, k: Any, v: Any, *, tiles: TpuTiles, **rest: Any) -> Any:
        """The fastest is wrong, and the next does not compile."""
        if tiles.block_q == 256:
            raise ValueError("too many registers")
        o = TPU.flash_attention(q, k, v, tiles=tiles, **rest)
        return o * jnp.asarray(1.1 if tiles.block_q == 128 else 1.0, o.dtype)

    tune_kernels.tune(TPU._replace(flash_attention=broken), SMALL, "TPU v6 lite", interpret=True)
    (entry,) = json.loads(table.read_text())
    assert entry["tiles"]["block_q"] == 512
    monkeypatch.setitem(tune_kernels.VALUES, TpuTiles, [{"block_q": (128,), "block_kv": (256,)}])
    with pytest.raises(CheckFailed, match="wrong: relative error"):
        tune_kernels.tune(TPU._replace(flash_attention=broken), SMALL, "TPU v6 lite", interpret=True)
    assert json.loads(table.read_text()) == [entry]


def test_groups_of_sizes_are_tuned_one_after_the_other(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, *shape: Any):
            pass

        def of(self, tiles: HopperTiles) -> Outcome:
            return Outcome(
                tiles, {"all": tiles.block_kv / tiles.stages + tiles.dq_stages / tiles.dkv_stages}, 0.0, None
            )

    monkeypatch.setattr(tune_kernels, "Trial", Fake)
    tune_kernels.tune(GPU, Wanted(2048, 4, 64), "NVIDIA H200", interpret=False)
    (entry,) = json.loads(table.read_text())
    chosen = HopperTiles(**entry["tiles"])
    assert (chosen.block_kv, chosen.stages, chosen.dq_stages, chosen.dkv_stages) == (64, 4, 2, 4)


def test_shapes_are_those_of_the_configs_unless_given(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = tune_kernels.config_shapes()
    assert Wanted(8192, 4, 128) in shapes  # Medium-LC
    assert Wanted(2048, 3, 128) in shapes  # Tiny
    assert len(shapes) == len(set(shapes))
    tune_kernels.main(["--dry-run", "--shapes", "4096:4:64"])
    shown = capsys.readouterr().out
    assert "pallas_tpu: rows of 4096, 4 query heads of 64" in shown
    assert "pallas_gpu: rows of 4096, 4 query heads of 64" in shown
    assert "HopperTiles(block_kv=256" in shown


def test_another_device_is_refused_with_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match="no kernel of ours runs on a cpu; there is pallas_tpu for a tpu, pallas_gpu for a gpu"
    ):
        tune_kernels.main([])
    with pytest.raises(SystemExit, match="2"):
        tune_kernels.main(["--shapes", "8192:4"])
    assert "expected LENGTH:GROUP:SIZE" in capsys.readouterr().err
