"""Draw what one query sees as a picture: the maps of a layer and head over the frames of the input."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.layout import (
    DPI,
    Box,
    Line,
    Panel,
    Strip,
    arrange,
    without_glyph_warnings,
)
from structvit_jax.analysis.explain.maps import Layer, Query
from structvit_jax.analysis.explain.overlay import Scale
from structvit_jax.data.reader import Crop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 8  # times beside each other
_TILES = 11.0  # inches that tiles beside each other take at most
_WIDEST = 14.5  # inches, of panels beside each other


class Row(NamedTuple):
    """A map over the times of a layer, and small maps over windows."""

    label: str
    maps: np.ndarray  # [time, height, width]
    windows: tuple[tuple[str, np.ndarray], ...] = ()  # titles and kernels [time, height, width], signed


def in_time(array: np.ndarray, axes: int) -> np.ndarray:
    """Return [*grid, ...] with a time of one if the grid is an image's."""
    return array if axes == 3 else array[None]


def rows(layer: Layer, query: Query, head: int) -> list[Row]:
    """Return the correlations with the dynamic kernel at the query, the attention of each structure kernel
    with the kernels that make it, and the final map. Maps with channels are averaged over them."""
    axes = len(layer.grid)
    key_kernels, value_kernels = (_of_head(kernels, head).mean(axis=-2) for kernels in layer.kernels())
    correlation, final = in_time(query.correlation, axes), in_time(query.final.mean(axis=-1), axes)
    kappa = in_time(query.kappa[_key_of(layer, query)].mean(axis=-1), axes)
    plain = layer.kind == "self-attention"
    windows = () if plain else (("dynamic kernel", kappa),)
    found = [Row("correlation with every position", correlation, windows)]
    for d, one in enumerate(in_time(a, axes) for a in query.attention):
        kernels = (
            ("key kernel", in_time(key_kernels[..., d], axes)),
            ("value kernel", in_time(value_kernels[..., d], axes)),
        )
        name = f"attention of structure kernel {d + 1}: {one.sum():.0%}"
        found.append(Row(name if layer.patterns > 1 else "attention", one, () if plain else kernels))
    return [*found, Row("final map: weight of each value", final)]


def _of_head(kernels: np.ndarray, head: int) -> np.ndarray:
    """[*window, heads or 1, channels or 1, D] -> [*window, channels or 1, D]."""
    return kernels[..., min(head, kernels.shape[-3] - 1), :, :]


def _key_of(layer: Layer, query: Query) -> tuple[int, ...]:
    """The key whose window the query is in the middle of, or next to it where a stride leaves keys out."""
    *time, row, column = query.position
    return (*time, row // layer.attention.stride, column // layer.attention.stride)


def seen_by_window(frames: np.ndarray, layer: Layer, query: Query) -> np.ndarray:
    """Return the pixels that the window around the query covers, of the frame in the middle of each of its
    times, black outside the input. Where grids do not divide the input, to the nearest pixel.

    Args:
      frames: uint8 [time, height, width, 3], what the model saw; an image has a time of one.
      layer, query: of the maps.

    Returns:
      uint8 [time of the window, height, width, 3].
    """
    axes, key = len(layer.grid), _key_of(layer, query)
    centres = (*key[:-2], *(at * layer.attention.stride for at in key[-2:]))
    sides = [(1, 0, 1)] * (3 - axes) + list(zip(layer.grid, centres, query.kappa.shape[axes:-1], strict=True))
    seen = frames
    for axis, (cells, centre, size) in enumerate(sides):
        pixels = frames.shape[axis] / cells
        first, end = centre - size // 2, centre + size // 2 + 1
        if axis == 0:
            picked = np.floor((np.arange(first, end) + 0.5) * pixels).astype(int)
        else:
            picked = np.arange(round(first * pixels), round(end * pixels))
        inside = (picked >= 0) & (picked < frames.shape[axis])
        seen = np.take(seen, picked, axis, mode="clip") * inside.reshape(-1, *[1] * (3 - axis))
    return seen


def draw(
    frames: np.ndarray,
    crop: Crop,
    layer: Layer,
    query: Query,
    head: int,
    heading: Sequence[Line],
    *,
    smooth: bool = True,
) -> bytes:
    """Return a PNG of `compose`."""
    file = io.BytesIO()
    with without_glyph_warnings():
        figure = compose(frames, crop, layer, query, head, heading, smooth=smooth)
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def compose(
    frames: np.ndarray,
    crop: Crop,
    layer: Layer,
    query: Query,
    head: int,
    heading: Sequence[Line],
    *,
    smooth: bool = True,
) -> Figure:
    """Return a figure: the frames with the query marked, and a panel of overlays for each map.

    Args:
      frames: uint8 [time, height, width, 3], RGB, as recorded; an image has a time of one.
      crop: the part of them that the model saw.
      layer, query, head: of the maps.
      heading: above the panels.
      smooth: whether maps are interpolated between positions.
    """
    shown = rows(layer, query, head)
    at = query.position[0] if len(layer.grid) == 3 else 0
    times = _spread(len(shown[0].maps), at)
    tile = _tile(frames.shape[2] / frames.shape[1], len(times))
    sizes = [max(1, round(side * DPI)) for side in tile[::-1]]
    shots = [overlay.enlarged(frames[frame_of(t, len(shown[0].maps), len(frames))], *sizes) for t in times]
    marks = [_cell(query, layer, crop, times.index(at))]
    panels = [_input_panel(shots, crop, times, len(shown[0].maps), len(frames), marks)]
    for number, row in enumerate(shown):
        scale = Scale.of(row.maps)
        tiles = [
            overlay.overlaid(shot, row.maps[t], scale, crop, smooth=smooth)
            for t, shot in zip(times, shots, strict=True)
        ]
        strips = [_kernel_strip(name, kernel) for name, kernel in row.windows]
        if number == 0:
            seen = seen_by_window(_cropped(frames, crop), layer, query)
            strips.append(Strip("pixels in its window", [_at_most(picture, 120) for picture in seen]))
        panels.append(Panel(row.label, tiles, (), scale, strips, marks, strong=number == 0))
    if len(layer.grid) == 3 and layer.grid[0] >= 4 and min(layer.grid[1:]) >= 6:
        panels.append(_slices(frames, crop, layer, query, sizes, smooth=smooth))
    return arrange(heading, panels, tile, widest=_WIDEST if len(times) == 1 else 0)


def frame_of(time: int, times: int, frames: int) -> int:
    """Return the frame in the middle of a time of a layer."""
    return int((time + 0.5) * frames / times)


def _spread(count: int, at: int) -> list[int]:
    """Some times, evenly spaced, of which `at` is one."""
    times = np.unique(np.linspace(0, count - 1, min(count, _MOST)).astype(int))
    times[np.abs(times - at).argmin()] = at
    return times.tolist()


def _tile(aspect: float, count: int) -> tuple[float, float]:
    """Width and height in inches of one of `count` tiles beside each other."""
    aspect = min(max(aspect, 1 / 3), 3.0)
    area = 4.2 if count == 1 else 1.75
    height = math.sqrt(area / aspect)
    shrink = min(1.0, _TILES / (count * height * aspect))
    return height * aspect * shrink, height * shrink


def _cropped(frames: np.ndarray, crop: Crop) -> np.ndarray:
    top, left, bottom, right = overlay.box(crop, *frames.shape[1:3])
    return frames[:, top:bottom, left:right]


def _cell(query: Query, layer: Layer, crop: Crop, tile: int) -> Box:
    """The query's cell of the grid, in the frame."""
    height, width = (side / n for side, n in zip((crop.height, crop.width), layer.grid[-2:], strict=True))
    row, column = query.position[-2:]
    return Box(tile, crop.left + column * width, crop.top + row * height, width, height)


def _input_panel(
    shots: Sequence[np.ndarray],
    crop: Crop,
    times: Sequence[int],
    count: int,
    frames: int,
    marks: Sequence[Box],
) -> Panel:
    whole = crop.height > 0.99 and crop.width > 0.99
    title = "input, query marked" + ("" if whole else "; the model saw the bright part")
    captions = [f"frame {frame_of(t, count, frames)}" for t in times] if frames > 1 else []
    return Panel(title, [overlay.dimmed(shot, crop) for shot in shots], captions, marks=marks)


def _kernel_strip(name: str, kernel: np.ndarray) -> Strip:
    most = float(np.abs(kernel).max())
    fractions = 0.5 + kernel / (2 * most or 1)
    return Strip(f"{name}, ±{most:.2g}", list(overlay.coloured(fractions, "kernel")))


def _at_most(picture: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    return overlay.enlarged(picture, *(max(1, round(length * scale)) for length in picture.shape[:2]))


def _slices(
    frames: np.ndarray, crop: Crop, layer: Layer, query: Query, sizes: Sequence[int], *, smooth: bool
) -> Panel:
    """The query's row and its column over time: what moves leaves a slanted line in the pixels and, beside
    them, in the correlations."""
    seen, scale = _cropped(frames, crop), Scale.of(query.correlation)
    _, row, column = query.position
    y, x = (int((at + 0.5) * n / cells) for at, n, cells in _along(query, seen, layer))
    tiles = []
    for pixels, values in (
        (seen[:, y], query.correlation[:, row]),
        (seen[:, :, x], query.correlation[:, :, column]),
    ):
        picture = overlay.enlarged(pixels, *sizes)
        over = overlay.overlaid(picture, values, scale, Crop(0, 0, 1, 1), smooth=smooth)
        tiles += [picture, over]
    captions = ["row", "its correlation", "column", "its correlation"]
    title = "the query's row and column over time (time runs down): motion is a slanted line"
    return Panel(title, tiles, captions, scale)


def _along(query: Query, seen: np.ndarray, layer: Layer) -> list[tuple[int, int, int]]:
    return list(zip(query.position[1:], seen.shape[1:3], layer.grid[1:], strict=True))
