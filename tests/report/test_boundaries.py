"""The picture of where chunks begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.report import boundaries
from smallcoder_jax.report.boundaries import COLUMNS, Boundaries, characters, draw_boundaries
from smallcoder_jax.report.charts import BLUE, ORANGE, read_png
from smallcoder_jax.report.run_folder import RunFolder

TEXT = b'def f(x):\n\treturn "caf\xc3\xa9 \xf0\x9f\x98\x80 $x$"  # \xe6\x97\xa5\n' * 4


def picture(text: bytes = TEXT, stages: int = 2) -> Boundaries:
    """Chunks of the first stage begin at every word, those of the second at every line."""
    data = np.frombuffer(text, np.uint8)
    behind = [np.isin(np.concatenate([[10], data[:-1]]), signs) for signs in ([10, 32, 40], [10])]
    probability = [np.where(here, 0.9, 0.2).astype(np.float32) for here in behind]
    return Boundaries([bytes([byte]) for byte in text], list(zip(behind, probability, strict=True))[:stages])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a b", ["a", "·", "b"]),
        (b"a\n\tb", ["a", "↵", "→", "b"]),
        ("é日x".encode(), ["é", "", "□", "", "", "x"]),  # the font lacks this one
        (b"\xff\x80a\xc3", ["◇", "□", "a", "□"]),  # a special piece, a stray byte, half a character
        ("a\u00ad\u2003".encode(), ["a", "□", "", "□", "", ""]),  # blank in the font
        ("e\u0301\u202e\0\x1b".encode(), ["e", "□", "", "□", "", "", "□", "□"]),  # nothing combines, turns or is hidden
    ],
)
def test_every_byte_has_its_cell(data: bytes, expected: list[str]) -> None:
    assert characters(data) == expected
    assert len(characters(data)) == len(data)


def has_color(pixels: np.ndarray, color: str) -> bool:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool(np.all(pixels[..., :3] == wanted, axis=-1).any())


def test_each_stage_has_its_color(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run $a$ \x1b")  # neither markup nor escapes
    path = draw_boundaries(picture(), folder, 7)
    assert path == folder.boundaries_chart
    both = read_png(path)
    assert [has_color(both, color) for color in (BLUE, ORANGE)] == [True, True]
    one = read_png(draw_boundaries(picture(stages=1), folder, 7))
    assert [has_color(one, color) for color in (BLUE, ORANGE)] == [True, False]
    assert one.shape[0] < both.shape[0]


def test_longer_text_has_more_lines(tmp_path: Path) -> None:
    sizes = [
        read_png(draw_boundaries(picture(b"a" * count), RunFolder(tmp_path), 1)).shape
        for count in (COLUMNS, COLUMNS + 1, 2 * COLUMNS)
    ]
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]


def test_tokens_of_several_bytes_and_special_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    monkeypatch.setattr(boundaries, "_draw_stage", lambda axes, number, starts, *rest: placed.append(starts.tolist()))
    nothing = np.zeros(4, bool), np.full(4, np.nan, np.float32)
    draw_boundaries(Boundaries([b"", b"ab", b"\xe6\x97\xa5", b"c"], [nothing]), RunFolder(tmp_path), 1)
    assert placed == [[0, 1, 3, 6]]
    monkeypatch.undo()
    draw_boundaries(
        Boundaries([b"", b"ab", b"\xe6\x97\xa5", b"c"], [nothing]), RunFolder(tmp_path), 1
    )  # no chunk at all
