"""Draws where a model that divides a text into chunks begins them: the characters, and under them one lane per stage.

matplotlib is used as in `charts`, and imported when something is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smallcoder_jax.base.display import one_line
from smallcoder_jax.base.files import write_bytes
from smallcoder_jax.report.charts import BLUE, DPI, FRAME, GREEN, GREY, INK, ORANGE, PURPLE
from smallcoder_jax.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 96  # bytes in a line
FONT = "DejaVu Sans Mono"  # comes with matplotlib
COLORS = (BLUE, ORANGE, GREEN, PURPLE)
_SPECIAL = b"\xff"  # occurs in no text; stands for a special piece
_SIGNS = {" ": "·", "\n": "↵", "\t": "→", "\udcff": "◇"}
_UNKNOWN = "□"  # a byte or character that cannot be shown
_TEXT, _LANE = 1.4, 1.1  # heights of the characters and of a stage's lane; a cell is 1 wide


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """A text of n tokens and its chunks. `pieces` are the bytes of each token, empty for a special piece. `stages`
    holds two arrays [n] for each stage, outermost first: whether a chunk begins at a token (bool), and the probability
    of it (float32)."""

    pieces: Sequence[bytes]
    stages: Sequence[tuple[np.ndarray, np.ndarray]]


def draw_boundaries(found: Boundaries, folder: RunFolder, step: int) -> Path:
    """Writes the picture to `charts/boundaries.png`, and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = [len(piece or _SPECIAL) for piece in found.pieces]
    cells = characters(b"".join(piece or _SPECIAL for piece in found.pieces))
    starts = np.cumsum([0, *lengths[:-1]])
    lines, height = -(-len(cells) // COLUMNS), _TEXT + _LANE * len(found.stages) + 0.5
    figure = Figure(figsize=(15.0, 1.1 + 0.17 * height * lines), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.012, 0.01, 0.976, 1 - 0.9 / figure.get_figheight()))
    axes.set(xlim=(0, COLUMNS), ylim=(-height * lines, 0))
    axes.set_axis_off()
    _draw_text(axes, cells, height)
    for number, (begins, probability) in enumerate(found.stages):
        _draw_stage(axes, number, starts, np.asarray(begins), np.nan_to_num(np.asarray(probability)), height)
    _draw_titles(figure, found, f"{one_line(folder.path.name)}   ·   step {step:,}", len(cells))
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_bytes(folder.boundaries_chart, buffer.getvalue())
    return folder.boundaries_chart


def characters(data: bytes) -> list[str]:
    """A sign for each byte of UTF-8: the character that begins there, if it can be shown in one cell, or nothing inside
    a character."""
    cells = []
    for character in data.decode("utf-8", "surrogateescape"):  # an invalid byte becomes half a surrogate pair
        size = len(character.encode("utf-8", "surrogateescape"))
        cells += [_SIGNS.get(character) or _sign(character), *[""] * (size - 1)]
    return cells


def _sign(character: str) -> str:
    shown = one_line(character)
    alone = len(shown) == 1 and not unicodedata.category(character).startswith("M") and _font_has(character)
    return shown if alone else _UNKNOWN


@functools.cache
def _font_has(character: str) -> bool:
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(FONT)).get_char_index(ord(character)) > 0


def _draw_text(axes: Axes, cells: Sequence[str], height: float) -> None:
    style = {"fontfamily": FONT, "fontsize": 11, "ha": "center", "va": "center", "parse_math": False}
    for place, sign in enumerate(cells):
        line, column = divmod(place, COLUMNS)
        color = GREY if sign in (*_SIGNS.values(), _UNKNOWN) else INK
        axes.text(column + 0.5, -line * height - _TEXT / 2, sign, color=color, **style)


def _draw_stage(
    axes: Axes, number: int, starts: np.ndarray, begins: np.ndarray, probability: np.ndarray, height: float
) -> None:
    """A bar per token, as high as its probability. Where a chunk begins, it is dark, and a line precedes the sign."""
    color = COLORS[number % len(COLORS)]
    lines, columns = np.divmod(starts, COLUMNS)
    floor = -lines * height - _TEXT - (number + 1) * _LANE
    tallest = 0.85 * _LANE
    colors = [color if begun else FRAME for begun in begins]
    axes.bar(columns + 0.08, tallest * probability, 0.84, floor, align="edge", color=colors, linewidth=0)
    for line in range(int(lines[-1]) + 1):  # the line of one half, above which a chunk begins
        axes.hlines(floor[lines == line][0] + tallest / 2, 0, COLUMNS, color=GREY, linewidth=0.5, linestyle=(0, (1, 3)))
    top = -lines[begins] * height - 0.08
    axes.vlines(columns[begins] + 0.02, top - (_TEXT - 0.16), top, color=color, linewidth=1.6 + 1.4 * number)


def _draw_titles(figure: Any, found: Boundaries, title: str, size: int) -> None:
    from matplotlib.patches import Patch

    style = {"fontsize": 14, "fontweight": "bold", "color": INK, "ha": "left", "va": "top", "parse_math": False}
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.12 * inch, f"Where chunks begin   ·   {title}", **style)
    handles = []
    for number, (begins, _) in enumerate(found.stages):
        count = int(np.sum(begins))
        length = f"{size / count:.1f} bytes each" if count else "none begins"
        handles.append(Patch(color=COLORS[number % len(COLORS)], label=f"stage {number + 1}: {count} chunks, {length}"))
    legend = {"loc": "upper left", "bbox_to_anchor": (0.006, 1 - 0.4 * inch), "ncols": len(handles), "frameon": False}
    figure.legend(handles=handles, fontsize=9, labelcolor=INK, **legend)
