"""Draw the maps of one query as a picture: overlays on frames, with colour bars and kernels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.drawing import Drawing
from structvit_jax.analysis.explain.overlay import Scale
from structvit_jax.analysis.explain.page_layout import (
    DPI,
    Box,
    Line,
    Panel,
    Strip,
    arrange,
    without_glyph_warnings,
)
from structvit_jax.data.reader import Crop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_TIMES = 8  # beside each other
_MAX_TILES_WIDTH = 11.0  # inches
_MAX_WIDTH = 14.5  # inches, of panels beside each other
_MAX_WINDOW = 120  # pixels, of the side of a window's pixels


def draw(drawing: Drawing, heading: Sequence[Line]) -> bytes:
    """Return the picture as a PNG; see `compose`."""
    file = io.BytesIO()
    with without_glyph_warnings():
        compose(drawing, heading).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def compose(drawing: Drawing, heading: Sequence[Line]) -> Figure:
    """Return a figure: the heading, the frames with the query marked, and a panel for each map.

    At most 8 times are shown, that of the query among them.
    """
    rows, (grid_times, *_), frames = drawing.rows(), drawing.grid, drawing.frames
    query_time = drawing.position[0]
    times = _spread(grid_times, query_time)
    tile = _tile_size(frames.shape[2] / frames.shape[1], len(times))
    size = [max(1, round(side * DPI)) for side in tile[::-1]]
    shots = [overlay.resized_frame(frames[_middle_frame(t, drawing)], *size) for t in times]
    marks = [Box(times.index(query_time), *drawing.cell)]
    panels = [_input_panel(drawing, shots, times, marks)]
    for number, row in enumerate(rows):
        scale = Scale.of(row.values)
        tiles = [
            overlay.overlaid(shot, row.values[t], scale, drawing.crop, smooth=drawing.smooth)
            for t, shot in zip(times, shots, strict=True)
        ]
        strips = [_kernel_strip(title, kernel) for title, kernel in row.kernels]
        if number == 0:
            strips.append(Strip("pixels in its window", list(map(_shrunk, drawing.window_pixels()))))
        panels.append(Panel(row.label, tiles, (), scale, strips, marks, strong=number == 0))
    if drawing.grid[0] >= 4 and min(drawing.grid[1:]) >= 6:
        panels.append(_slices_panel(drawing, size))
    return arrange(heading, panels, tile, max_width=_MAX_WIDTH if len(times) == 1 else 0)


def _middle_frame(time: int, drawing: Drawing) -> int:
    """Return the frame in the middle of a time of the grid."""
    return int((time + 0.5) * len(drawing.frames) / drawing.grid[0])


def _spread(count: int, included: int) -> list[int]:
    """Return evenly spaced times, the nearest of them replaced by `included`."""
    times = np.unique(np.linspace(0, count - 1, min(count, _MAX_TIMES)).astype(int))
    times[np.abs(times - included).argmin()] = included
    return times.tolist()


def _tile_size(aspect: float, count: int) -> tuple[float, float]:
    """Return the width and height in inches of one of `count` tiles beside each other."""
    aspect = min(max(aspect, 1 / 3), 3.0)
    height = math.sqrt((4.2 if count == 1 else 1.75) / aspect)
    shrink = min(1.0, _MAX_TILES_WIDTH / (count * height * aspect))
    return height * aspect * shrink, height * shrink


def _input_panel(
    drawing: Drawing, shots: Sequence[np.ndarray], times: Sequence[int], marks: Sequence[Box]
) -> Panel:
    whole = drawing.crop.height > 0.99 and drawing.crop.width > 0.99
    title = "input, query marked" + ("" if whole else "; the model saw the bright part")
    captions = [f"frame {_middle_frame(t, drawing)}" for t in times] if len(drawing.frames) > 1 else []
    return Panel(title, [overlay.dimmed(shot, drawing.crop) for shot in shots], captions, marks=marks)


def _kernel_strip(title: str, kernel: np.ndarray) -> Strip:
    largest = float(np.abs(kernel).max())
    fractions = 0.5 + kernel / (2 * largest or 1)
    return Strip(f"{title}, ±{largest:.2g}", list(overlay.coloured(fractions, "kernel")))


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    scale = _MAX_WINDOW / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    return overlay.resized_frame(pixels, *(max(1, round(side * scale)) for side in pixels.shape[:2]))


def _slices_panel(drawing: Drawing, size: Sequence[int]) -> Panel:
    """Return the query's row and column over time: motion is a slanted line in pixels and correlations."""
    seen, correlation = drawing.seen, drawing.query.correlation
    (_, rows, columns), (_, row, column) = drawing.grid, drawing.position
    y, x = int((row + 0.5) * seen.shape[1] / rows), int((column + 0.5) * seen.shape[2] / columns)
    scale, tiles = Scale.of(correlation), []
    for pixels, values in ((seen[:, y], correlation[:, row]), (seen[:, :, x], correlation[:, :, column])):
        slice_ = overlay.resized_frame(pixels, *size)
        tiles += [slice_, overlay.overlaid(slice_, values, scale, Crop(0, 0, 1, 1), smooth=drawing.smooth)]
    title = "the query's row and column over time (time runs down): motion is a slanted line"
    return Panel(title, tiles, ["row", "its correlation", "column", "its correlation"], scale)
