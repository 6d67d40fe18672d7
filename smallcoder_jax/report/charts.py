"""Draws the charts of a run from its history.

Only matplotlib's object interface with the Agg canvas is used, without style sheets, so there are no windows and no
state shared with other threads. matplotlib is imported when the first chart is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smallcoder_jax.base.display import one_line
from smallcoder_jax.base.files import write_bytes
from smallcoder_jax.base.terminal import human_count
from smallcoder_jax.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563eb", "#ea580c", "#0d9488", "#7c3aed", "#64748b"
INK, RULE, FRAME = "#1e293b", "#e2e8f0", "#cbd5e1"
SIZE_INCHES, DPI = (15.0, 8.4), 100  # 1500 x 840 pixels
MAX_POINTS = 1500  # longer curves are thinned to this, because a panel has fewer pixels

# Shown if bits per byte are not logged: the first of these measures that is logged, with its title and unit.
OTHER_MEASURES = {
    "reward": ("Mean reward", "reward of an answer"),
    "margin": ("Margin", "better minus worse answer"),
    "perplexity": ("Perplexity", "of the counted tokens"),
}


def draw_training(history: Mapping[str, Any], folder: RunFolder, step: int) -> Path:
    """Draws the six panels of a run: loss, bits per byte, accuracy, learning rate, gradient norm and throughput. For a
    policy, reward and divergence replace bits per byte and accuracy.

    Args:
      history: lists as in `metrics_history.json`: `steps` with `loss, accuracy, ...`, `eval_steps` with `eval_loss,
        eval_bits_per_byte, eval_accuracy`, and `references`, bits per byte by compressor. None and NaN leave gaps;
        keys may be missing.
      folder: the run folder. The chart is written to `charts/training_step_NNNNNN.png` and
        `charts/training_latest.png`.
      step: the current step of the run. The last logged step may be an earlier one.

    Returns:
      The path of the numbered chart.
    """
    content = _render(history, folder.path.name, step)
    path = folder.charts / f"training_step_{step:06d}.png"
    write_bytes(path, content)
    write_bytes(folder.latest_chart, content)
    return path


def read_png(path: Path) -> np.ndarray:
    """A PNG file as uint8 `[height, width, channels]`."""
    from matplotlib import image

    return np.round(image.imread(path) * 255).astype(np.uint8)


def _render(history: Mapping[str, Any], name: str, step: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=layout, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    train, evaluation = _Curves(history, ""), _Curves(history, "eval_")
    policy = evaluation.get("start_kl")[0].size > 0
    _draw_loss(panels[0, 0], train, evaluation, policy)
    other = next((name for name in OTHER_MEASURES if evaluation.get(name)[0].size), None)
    if other is None or evaluation.get("bits_per_byte")[0].size:
        _draw_bits_per_byte(panels[0, 1], evaluation, history.get("references", {}))
    else:
        _draw_measure(panels[0, 1], train, evaluation, other, *OTHER_MEASURES[other])
    if policy:
        _draw_measure(panels[0, 2], train, evaluation, "start_kl", "Divergence from the start", "nats per answer")
    else:
        _draw_accuracy(panels[0, 2], train, evaluation)
    _draw_learning_rate(panels[1, 0], train)
    _draw_gradient_norm(panels[1, 1], train)
    _draw_throughput(panels[1, 2], train)
    last_step = max(train.last_step, evaluation.last_step)
    for axes in panels.flat:
        _step_axis(axes, last_step)
    title = f"{one_line(name)}   ·   step {step:,}"
    style = {"fontsize": 14, "fontweight": "bold", "color": INK}
    figure.suptitle(title, x=0.012, ha="left", parse_math=False, **style)  # a name may contain dollar signs
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


class _Curves:
    """The curves of a history by name, as float arrays over steps."""

    def __init__(self, history: Mapping[str, Any], prefix: str) -> None:
        self._history, self._prefix = history, prefix
        self._steps = np.array(history.get(f"{prefix}steps", []), dtype=float)
        self.last_step = int(self._steps[-1]) if self._steps.size else 0

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps and the finite values of a curve; empty if it was never logged."""
        values = np.array(self._history.get(self._prefix + name, []), dtype=float)  # None becomes NaN
        if values.size != self._steps.size:
            return np.empty(0), np.empty(0)
        finite = np.isfinite(values)
        return self._steps[finite], values[finite]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thins a curve to about MAX_POINTS points. Keeps the lowest and highest value of each bin, so that spikes stay."""
    if steps.size <= MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(steps.size), MAX_POINTS // 2)
    kept = {int(index[pick(values[index])]) for index in bins for pick in (np.argmin, np.argmax)}
    chosen = np.array(sorted(kept | {0, steps.size - 1}))
    return steps[chosen], values[chosen]


def _smooth(values: np.ndarray) -> np.ndarray:
    """The moving mean over a centred window, a thirtieth of the curve wide and shorter at the ends."""
    window = np.hanning(2 * (values.size // 60) + 3)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _panel(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.set_ylabel(unit, fontsize=9, color=GREY)
    axes.grid(True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(FRAME)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(colors=GREY, labelsize=9, length=3)


def _step_axis(axes: Axes, last_step: int) -> None:
    """An axis of steps from 0 to the last one, the same for every panel, so that they can be compared."""
    from matplotlib.ticker import MaxNLocator

    unit, suffix = (1e6, "M") if last_step >= 5e6 else (1e3, "K") if last_step >= 5e3 else (1, "")
    axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / unit:g}{suffix if step else ''}")


def _empty(axes: Axes, message: str) -> None:
    """Says in an empty panel why it is empty."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=GREY)
    axes.set_ylabel("")
    axes.tick_params(labelleft=False, left=False)
    axes.grid(False)


def _line(axes: Axes, curve: tuple[np.ndarray, np.ndarray], color: str, label: str, **style: Any) -> None:
    """Draws a curve. A single point, which a line would not show, gets a marker."""
    steps, values = _thin(*curve)
    marker = "o" if steps.size == 1 else None
    axes.plot(steps, values, color=color, label=label, **{"linewidth": 1.6, "marker": marker, **style})


def _raw_and_smooth(axes: Axes, curve: tuple[np.ndarray, np.ndarray], color: str, label: str) -> None:
    steps, values = curve
    if steps.size < 20:  # nothing to smooth yet
        _line(axes, curve, color, label)
    elif steps.size:
        _line(axes, curve, color, "_raw", linewidth=0.8, alpha=0.22)
        _line(axes, (steps, _smooth(values)), color, label)


def _points(axes: Axes, curve: tuple[np.ndarray, np.ndarray], color: str, label: str) -> None:
    _line(axes, curve, color, label, marker="o", markersize=4.5, markeredgecolor="white", markeredgewidth=0.8)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="best",
        fontsize=9,
        frameon=True,
        framealpha=0.9,
        edgecolor=RULE,
        labelcolor=INK,
    )


def _focus(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Limits the axis of a falling curve to the values after its first twentieth, if the beginning dwarfs the rest."""
    if values.size < 50:
        return
    later = values[values.size // 20 :]
    low, high = later.min(), np.percentile(later, 99.5)
    if values.max() > high + (high - low) and high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.3 * (high - low))


def _draw_loss(axes: Axes, train: _Curves, evaluation: _Curves, policy: bool) -> None:
    """Draws the loss; for a policy, only in training. Its validation loss is the negative reward, shown elsewhere."""
    _panel(axes, "Loss", "objective per token" if policy else "nats per token")
    curve, checks = train.get("loss"), (np.empty(0), np.empty(0)) if policy else evaluation.get("loss")
    if not curve[0].size and not checks[0].size:
        return _empty(axes, "no finite loss yet")
    if curve[0].size:
        _raw_and_smooth(axes, curve, BLUE, f"training  {curve[1][-1]:.3f}")
        _focus(axes, *curve)
    if checks[0].size:
        _points(axes, checks, ORANGE, f"validation  {checks[1][-1]:.3f}")
    _legend(axes)


def _draw_bits_per_byte(axes: Axes, evaluation: _Curves, references: Mapping[str, float]) -> None:
    _panel(axes, "Bits per byte, validation", "bits per byte")
    curve = evaluation.get("bits_per_byte")
    if not curve[0].size and not references:
        return _empty(axes, "no evaluation yet")
    if curve[0].size:
        # With few eval.batches, the model was evaluated on only a part of the text that the compressors were given.
        _points(axes, curve, ORANGE, f"this model, on the rows evaluated  {curve[1][-1]:.3f}")
    styles = ((0, (5, 3)), (0, (1, 2)), (0, (5, 2, 1, 2)), (0, (3, 1)))
    for index, (name, value) in enumerate(references.items()):
        axes.axhline(value, color=GREY, linewidth=1.3, linestyle=styles[index % 4])
        # On its line, at the end that is far from the curve. A legend of all lines would cover the curve.
        where = {"xy": (0.99, value), "xycoords": ("axes fraction", "data"), "xytext": (0, 2), "ha": "right"}
        axes.annotate(f"{name}  {value:.3f}", **where, textcoords="offset points", fontsize=8, color=GREY)
    if references:
        axes.set_title("compressors: all held-out files", loc="right", fontsize=7, color=GREY)
    if curve[0].size:
        _legend(axes)


def _draw_measure(axes: Axes, train: _Curves, evaluation: _Curves, name: str, title: str, unit: str) -> None:
    """Draws a measure of the task. Training may not log it."""
    _panel(axes, title, unit)
    curve, checks = train.get(name), evaluation.get(name)
    if curve[0].size:
        _raw_and_smooth(axes, curve, BLUE, f"training  {curve[1][-1]:.3f}")
    _points(axes, checks, ORANGE, f"validation  {checks[1][-1]:.3f}")
    if name == "margin":  # also draw the two rewards whose difference it is, which dpo logs, because both may fall
        for side, color in (("chosen", GREEN), ("rejected", PURPLE)):
            checks = evaluation.get(f"{side}_reward")
            if checks[0].size:
                _points(axes, checks, color, f"{side}, validation  {checks[1][-1]:.3f}")
    _legend(axes)


def _draw_accuracy(axes: Axes, train: _Curves, evaluation: _Curves) -> None:
    if evaluation.get("margin")[0].size:
        _panel(axes, "Better answer above", "share of pairs")
    else:
        _panel(axes, "Next-token accuracy", "share of tokens")
    curve, checks = train.get("accuracy"), evaluation.get("accuracy")
    if not curve[0].size and not checks[0].size:
        return _empty(axes, "accuracy is not logged")
    if curve[0].size:
        _raw_and_smooth(axes, curve, BLUE, f"training  {curve[1][-1]:.1%}")
    if checks[0].size:
        _points(axes, checks, ORANGE, f"validation  {checks[1][-1]:.1%}")
    axes.set_ylim(0, max(axes.get_ylim()[1], 0.02))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _legend(axes)


def _draw_learning_rate(axes: Axes, train: _Curves) -> None:
    _panel(axes, "Learning rate", "per step")
    curve = train.get("learning_rate")
    if not curve[0].size:
        return _empty(axes, "learning rate is not logged")
    _line(axes, curve, PURPLE, "learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set(color=GREY, fontsize=9)


def _draw_gradient_norm(axes: Axes, train: _Curves) -> None:
    _panel(axes, "Gradient norm, before clipping", "global L2 norm")
    steps, values = train.get("grad_norm")
    steps, values = steps[values > 0], values[values > 0]  # a logarithmic axis has no zero
    if not steps.size:
        return _empty(axes, "no finite gradient norm yet")
    _raw_and_smooth(axes, (steps, values), GREEN, "gradient norm")
    axes.set_yscale("log")
    few_decades = values.max() / values.min() < 100
    axes.yaxis.set_major_formatter(lambda norm, _: f"{norm:g}")
    axes.yaxis.set_minor_formatter(lambda norm, _: f"{norm:g}" if few_decades and f"{norm:e}"[0] in "25" else "")
    axes.grid(True, which="minor", axis="y", color=RULE, linewidth=0.4)
    axes.tick_params(which="minor", colors=GREY, labelsize=8, length=2)


def _draw_throughput(axes: Axes, train: _Curves) -> None:
    _panel(axes, "Throughput and time waiting for data", "tokens per second")
    curve, waits = train.get("throughput"), train.get("data_wait")
    if not curve[0].size:
        return _empty(axes, "throughput is not logged")
    _raw_and_smooth(axes, curve, BLUE, f"{human_count(np.median(curve[1]))} tokens/s")
    axes.set_ylim(0, 1.3 * np.percentile(curve[1], 99.5) or 1.0)  # room for the legend above the curve
    axes.yaxis.set_major_formatter(lambda rate, _: human_count(rate))
    lines, top = axes.get_lines(), axes
    if waits[0].size:
        top = axes.twinx()
        milliseconds = waits[1] * 1e3
        _raw_and_smooth(top, (waits[0], milliseconds), ORANGE, f"{np.median(milliseconds):.2g} ms data wait")
        # The first steps wait for the pipeline to start, and may be outside the panel.
        top.set_ylim(0, 1.6 * np.percentile(milliseconds, 98) or 1.0)
        top.set_ylabel("ms per step", fontsize=9, color=GREY)
        top.tick_params(colors=GREY, labelsize=9, length=3)
        top.spines[:].set_visible(False)
        lines = [*lines, *top.get_lines()]
    named = [line for line in lines if not str(line.get_label()).startswith("_")]
    top.legend(handles=named, title="median", title_fontsize=9, loc="upper right", fontsize=9, ncols=2, edgecolor=RULE)
