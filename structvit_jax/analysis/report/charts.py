"""Charts of a report: curves of several runs, and the confusion matrix of many classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from structvit_jax.analysis.html import EmbeddedImage, data_url
from structvit_jax.analysis.report.record import Record

# The palette of Okabe and Ito, safe for colour-blind readers. Colours with high contrast on white are first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
_DASHES = ((), (5, 2), (1, 1.5), (5, 1.5, 1, 1.5))  # distinguish runs with the same colour
_WINDOW, _MAX_WINDOW = 0.02, 50  # steps averaged on each side: fraction of all steps, maximum


class LineStyle(NamedTuple):
    """How a run is drawn in all charts."""

    colour: str
    dashes: tuple[float, ...]  # lengths of line and gap, in line widths


class Chart(NamedTuple):
    """One metric over steps."""

    title: str
    line: str  # metric of training steps, drawn as a line
    smooth: bool = True
    dots: str | None = None  # metric of evaluations, drawn as dots
    log: bool = False  # logarithmic axis


CHARTS = (
    Chart("Training loss", "loss"),
    Chart("Top-1 (line: training, dots: test)", "top1", dots="eval_top1"),
    Chart("Learning rate", "lr", smooth=False),
    Chart("Gradient norm", "grad_norm", log=True),
)
SMOOTHING = (
    f"All lines except the learning rate are smoothed: each point is the mean over the {2 * _WINDOW:.0%} of"
    f" all steps around it, at most {2 * _MAX_WINDOW} steps."
)


def line_style(number: int) -> LineStyle:
    """Return the style of run `number`."""
    return LineStyle(COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average of values [steps]; near both ends, it is over fewer steps."""
    reach = min(int(_WINDOW * len(values)), _MAX_WINDOW)
    window = np.ones(2 * reach + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw_curves(chart: Chart, records: Sequence[Record]) -> EmbeddedImage | None:
    """Draw one chart of all runs; return None if no run has logged its metric."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for number, record in enumerate(records):
        colour, dashes = line_style(number)
        steps, values = record.curve(chart.line)
        if chart.smooth and len(values):
            values = smoothed(values)
        axes.plot(steps, values, color=colour, linewidth=1.5, dashes=dashes or (None, None))
        if chart.dots:
            axes.plot(*record.curve(chart.dots), "o", color=colour, markersize=6, markeredgecolor="white")
    if not np.isfinite(axes.dataLim.x1):
        return None
    if chart.log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    names = ", ".join(record.name for record in records)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return EmbeddedImage(data_url(file.getvalue(), "image/svg+xml"), f"{chart.title} over steps: {names}")


def draw_confusion(counts: np.ndarray) -> EmbeddedImage:
    """Draw a confusion matrix of counts [true, predicted]; each row is shown as fractions of its sum."""
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7.5, 6.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_xlabel("number of the predicted class")
    axes.set_ylabel("number of the true class")
    figure.colorbar(image, label="fraction of the true class's examples", fraction=0.045)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=max(110, len(counts) / 5))  # at least one pixel per class
    alt = f"Confusion matrix of {len(counts)} classes: rows are true classes, columns predictions"
    return EmbeddedImage(data_url(file.getvalue(), "image/png"), alt)
