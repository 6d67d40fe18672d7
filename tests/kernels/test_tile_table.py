"""The table of tuned tiles: what it finds, what it says, and how it is written."""

import json
from pathlib import Path

import pytest

from smallcoder_jax.kernels import tile_table
from smallcoder_jax.kernels.tiles import HopperTiles, TpuTiles
from smallcoder_jax.ops.attention import choose

V6E = "TPU v6 lite"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiles_table.json"
    path.write_text("[]\n")
    monkeypatch.setattr(tile_table, "TABLE", path)
    tile_table.read_table.cache_clear()
    yield path
    tile_table.read_table.cache_clear()


def test_the_table_of_the_package_can_be_read() -> None:
    kinds = {kind.__name__: kind for kind in (TpuTiles, HopperTiles)}
    for entry in tile_table.read_table():
        assert kinds[entry["class"]](**entry["tiles"])


@pytest.mark.parametrize(("length", "wanted"), [(1, 1024), (1024, 1024), (1025, 2048), (8192, 8192), (8193, 16384)])
def test_lengths_share_buckets(length: int, wanted: int) -> None:
    assert tile_table.bucket(length) == wanted


def test_what_was_tuned_is_found_for_its_shape_alone(table: Path) -> None:
    tile_table.write_entry(TpuTiles(1024, 512), V6E, 128, 4, 8192, {"microseconds": 1})
    found = tile_table.lookup(TpuTiles, V6E, 128, 4, 5000)
    assert found.tiles == TpuTiles(1024, 512)
    assert found.tuned
    assert "tuned for TPU v6 lite, head size 128, group 4, rows of up to 8192" in found.origin
    others = [
        ("TPU v5", 128, 4, 8192),
        (V6E, 64, 4, 8192),
        (V6E, 128, 2, 8192),
        (V6E, 128, 4, 4096),
        (None, 128, 4, 8192),
    ]
    for kind, shape in [*((TpuTiles, shape) for shape in others), (HopperTiles, (V6E, 128, 4, 8192))]:
        default = tile_table.lookup(kind, *shape)
        assert default.tiles == kind()
        assert not default.tuned
        assert "the default: not tuned for" in default.origin


def test_a_shape_has_one_entry_and_others_stay(table: Path) -> None:
    tile_table.write_entry(TpuTiles(1024, 512), V6E, 128, 4, 8192, {})
    tile_table.write_entry(HopperTiles(stages=4), "NVIDIA H200", 128, 4, 8192, {"date": "2000-01-01"})
    tile_table.write_entry(TpuTiles(256, 512), V6E, 128, 4, 8000, {})
    entries = json.loads(table.read_text())
    assert [(entry["class"], entry["length"]) for entry in entries] == [("HopperTiles", 8192), ("TpuTiles", 8192)]
    assert entries[0]["measured"] == {"date": "2000-01-01"}
    assert tile_table.lookup(HopperTiles, "NVIDIA H200", 128, 4, 8192).tiles.stages == 4
    assert tile_table.lookup(TpuTiles, V6E, 128, 4, 8192).tiles == TpuTiles(256, 512)
    assert list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "expected a list"),
        ('[{"class": "TpuTiles"}]', "without device, size"),
    ],
)
def test_a_malformed_table_is_refused(table: Path, text: str, words: str) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match=words):
        tile_table.lookup(TpuTiles, V6E, 128, 4, 8192)


@pytest.mark.parametrize("tiles", [{"block_q": 100}, {"block": 128}])
def test_tiles_that_their_class_refuses_are_refused_with_the_entry(table: Path, tiles: dict[str, int]) -> None:
    entry = {
        "class": "TpuTiles",
        "device": V6E,
        "size": 128,
        "group": 4,
        "length": 8192,
        "tiles": tiles,
        "measured": {},
    }
    table.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"tiles_table\.json: .*tune that shape again"):
        tile_table.lookup(TpuTiles, V6E, 128, 4, 8192)


def test_attention_takes_the_tiles_and_says_where_they_are_from(table: Path) -> None:
    shape = {
        "length": 8192,
        "keys": 8192,
        "group": 4,
        "size": 128,
        "dtype": "bfloat16",
        "platform": "tpu",
        "device": V6E,
    }
    assert "the default: not tuned for TPU v6 lite" in choose("auto", **shape).reason
    tile_table.write_entry(TpuTiles(256, 128), V6E, 128, 4, 8192, {})
    chosen = choose("auto", **shape)
    assert chosen.tiles == TpuTiles(256, 128)
    assert "block_q=256, block_kv=128), tuned for TPU v6 lite" in chosen.reason
