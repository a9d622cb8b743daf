"""What one query sees, as a picture."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.explain.maps import Layer, Query

_MOST = 8  # maps beside each other


class Row(NamedTuple):
    """Maps in a row: over the frames, then over the windows of kernels."""

    label: str
    maps: np.ndarray  # [time, height, width]
    colours: str  # "signed", symmetric about zero, or "positive"
    most: float  # the value of the strongest colour
    windows: tuple[tuple[str, np.ndarray], ...] = ()  # titles and kernels [time, height, width], signed


def in_time(array: np.ndarray, axes: int) -> np.ndarray:
    """[*grid, ...] with a time of one where the grid is an image's."""
    return array if axes == 3 else array[None]


def rows(layer: Layer, query: Query, head: int) -> list[Row]:
    """The correlations beside the dynamic kernel where the query itself is, the attention of each pattern
    beside the kernels that make it, and the final map. What has channels is their mean."""
    axes = len(layer.grid)
    key_kernels, value_kernels = (_of_head(kernels, head).mean(axis=-2) for kernels in layer.kernels())
    correlation, final = in_time(query.correlation, axes), in_time(query.final.mean(axis=-1), axes)
    attention = [in_time(one, axes) for one in query.attention]
    most = float(query.attention.max())
    kappa = in_time(query.kappa[_key_of(layer, query)].mean(axis=-1), axes)
    windows = (("dynamic kernel there", kappa),)
    found = [Row("correlation", correlation, "signed", float(np.abs(correlation).max()), windows)]
    for d, one in enumerate(attention):
        kernels = (
            ("key kernel", in_time(key_kernels[..., d], axes)),
            ("value kernel", in_time(value_kernels[..., d], axes)),
        )
        found.append(Row(f"pattern {d + 1}\n{one.sum():.0%}", one, "positive", most, kernels))
    return [*found, Row("final map", final, "signed", float(np.abs(final).max()))]


def _key_of(layer: Layer, query: Query) -> tuple[int, ...]:
    """The key whose window the query is in the middle of, or next to it where a stride leaves keys out."""
    *time, row, column = query.position
    return (*time, row // layer.attention.stride, column // layer.attention.stride)


def seen_by_window(frames: np.ndarray, layer: Layer, query: Query) -> np.ndarray:
    """The pixels that the window around the query covers, of the frame in the middle of each of its times,
    black outside the input. Where grids do not divide the input, to the nearest pixel.

    Args:
      frames: uint8 [time, height, width, 3]; an image has a time of one.
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


def _of_head(kernels: np.ndarray, head: int) -> np.ndarray:
    """[*window, heads or 1, channels or 1, D] -> [*window, channels or 1, D]."""
    return kernels[..., min(head, kernels.shape[-3] - 1), :, :]


def draw(pixels: np.ndarray, layer: Layer, query: Query, head: int, title: str) -> bytes:
    """A PNG: the input with the query marked, and its rows of maps below.

    Args:
      pixels: uint8 [[time,] height, width, 3], as the model saw them, RGB.
      layer, query, head: of the maps.
      title: a line above.
    """
    from matplotlib.figure import Figure  # here: half a second, for those who draw

    shown = rows(layer, query, head)
    frames = in_time(pixels, len(layer.grid))
    times = _spread(len(shown[0].maps), _MOST)
    windows = max(sum(len(kernel) for _, kernel in row.windows) for row in shown)
    width = 1.3 * len(times) + 0.7 * windows
    figure = Figure(figsize=(width + 1.6, 1.3 * (len(shown) + 1) + 0.7), layout="constrained")
    rank = f"effective rank of the dynamic kernels {query.rank:.2f} of {layer.patterns}"
    figure.suptitle(f"{title}\n{rank}", fontsize=9)
    ratios = [1.3] * len(times) + [0.2] + [0.7] * windows
    places = figure.subplots(len(shown) + 1, len(ratios), gridspec_kw={"width_ratios": ratios}, squeeze=False)
    for place in places.flat:
        place.set_axis_off()
    _draw_frames(places[0], frames, layer, query, times)
    under, seen = places[0][len(times) + 1 :], seen_by_window(frames, layer, query)
    for place, picture in zip(under, seen, strict=False):
        place.imshow(picture)
    under[len(seen) // 2].set_title("pixels under its window", fontsize=7)
    for line, row in zip(places[1:], shown, strict=True):
        _draw_row(line, row, times)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _draw_frames(places, frames, layer: Layer, query: Query, times: np.ndarray) -> None:
    """The frame in the middle of what each map below is of."""
    *time, y, x = ((at + 0.5) / n for at, n in zip(query.position, layer.grid, strict=True))
    chosen = ((times + 0.5) * len(frames) / (times[-1] + 1)).astype(int)
    for number, place in zip(chosen, places, strict=False):
        place.imshow(frames[number])
        place.set_title(f"frame {number}" if time else "input", fontsize=8)
    column = int(np.abs(times - query.position[0]).argmin()) if time else 0
    height, width = frames.shape[1:3]
    mark = {"color": "#d95f02", "markersize": 11, "markeredgewidth": 2, "markerfacecolor": "none"}
    places[column].plot(x * width - 0.5, y * height - 0.5, "s", **mark)
    _write(places[0], "input,\nquery marked")


def _draw_row(places, row: Row, times: np.ndarray) -> None:
    colours: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": row.most}
    if row.colours == "signed":
        colours = {"cmap": "RdBu_r", "vmin": -row.most, "vmax": row.most}
    for number, place in zip(times, places, strict=False):
        place.imshow(row.maps[number], **colours)
    sign = "±" if row.colours == "signed" else "0 to "
    _write(places[0], f"{row.label}\n{sign}{row.most:.2g}")
    start = len(times) + 1  # after a gap
    for name, kernel in row.windows:
        most = float(np.abs(kernel).max()) or 1.0
        for place, picture in zip(places[start:], kernel, strict=False):
            place.imshow(picture, cmap="PuOr_r", vmin=-most, vmax=most)
        places[start + len(kernel) // 2].set_title(f"{name}, ±{most:.2g}", fontsize=7)
        start += len(kernel)


def _write(place, words: str) -> None:
    """To the left of a row."""
    place.text(-0.1, 0.5, words, fontsize=8, ha="right", va="center", transform=place.transAxes)
