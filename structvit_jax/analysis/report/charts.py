"""Figures of a report: curves of several runs, and a confusion matrix too large for a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from structvit_jax.analysis.report.markup import Markup, image
from structvit_jax.analysis.report.record import Record

# Okabe and Ito's colours, which people with any colour vision tell apart, the strongest on white first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
DASHES = ((), (5, 2), (1, 1.5), (5, 1.5, 1, 1.5))  # of line and gap; when all colours have been used
_SMOOTHED, _MOST = 0.02, 50  # a mean reaches over this share of the steps to either side, and so many at most


class Quantity(NamedTuple):
    """What one figure shows over steps."""

    title: str
    line: str  # a metric of steps
    smooth: bool = True
    dots: str | None = None  # a metric of evaluations
    log: bool = False


QUANTITIES = (
    Quantity("Training loss", "loss"),
    Quantity("Top-1: line training, dots test", "top1", dots="eval_top1"),
    Quantity("Learning rate", "lr", smooth=False),
    Quantity("Gradient norm", "grad_norm", log=True),
)
SMOOTHING = (
    "All lines but the learning rate are smoothed: a point is the mean of the"
    f" {2 * _SMOOTHED:.0%} of steps around it, {2 * _MOST} at most."
)


def style(number: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of a run."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, of fewer at both ends."""
    reach = min(int(_SMOOTHED * len(values)), _MOST)
    window = np.ones(2 * reach + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def curves(quantity: Quantity, records: Sequence[Record]) -> Markup | None:
    """One figure of all runs; None if none has such values."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for number, record in enumerate(records):
        colour, dashes = style(number)
        steps, values = record.curve(quantity.line)
        drawn = smoothed(values) if quantity.smooth and len(values) else values
        axes.plot(steps, drawn, color=colour, linewidth=1.5, dashes=dashes or (None, None))
        if quantity.dots:
            axes.plot(*record.curve(quantity.dots), "o", color=colour, markersize=6, markeredgecolor="white")
    if not np.isfinite(axes.dataLim.x1):
        return None
    if quantity.log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(quantity.title, loc="left", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    names = ", ".join(record.name for record in records)
    return image(_saved(figure, "svg"), "image/svg+xml", f"{quantity.title} over steps: {names}")


def confusion(counts: np.ndarray) -> Markup:
    """A matrix of counts [true, predicted] as shares of its rows, in colour."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7.5, 6.6), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_xlabel("predicted class, by number")
    axes.set_ylabel("true class, by number")
    figure.colorbar(drawn, label="share of the true class's examples", fraction=0.045)
    dots = max(110, len(counts) / 5)  # an inch; the matrix takes more than five
    alt = f"Confusion matrix of {len(counts)} classes, rows true, columns predicted"
    return image(_saved(figure, "png", dots), "image/png", alt)


def _saved(figure: Figure, kind: str, dots: float = 110) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=dots, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()
