"""Draw the maps of a query as an animation: the frames and their overlays play beside each other."""

from __future__ import annotations

import fractions
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.maps import Layer, Query
from structvit_jax.analysis.explain.overlay import Scale
from structvit_jax.analysis.explain.picture import Row, rows
from structvit_jax.data.reader import Crop

MOST = 8 * 2**20  # bytes of a GIF; tiles are made smaller until it fits
_AREAS = (240**2, 170**2, 120**2, 80**2)  # pixels of a tile, the largest first
_ACROSS = 4  # tiles beside each other
_GAP, _TITLE = 6, 18  # pixels
_SECONDS, _SLOWEST, _FASTEST = 2.5, 2.0, 12.0  # of a clip; frames per second
_REPEATS = 3  # of a clip in an MP4, which players do not repeat by themselves


def draw(
    frames: np.ndarray,
    crop: Crop,
    layer: Layer,
    query: Query,
    head: int,
    kind: str,
    *,
    smooth: bool = True,
) -> bytes:
    """Return the animation as a file of one of `FORMATS`.

    Args:
      frames: uint8 [time, height, width, 3], RGB, as recorded.
      crop: the part of them that the model saw.
      layer, query, head: of the maps.
      kind: a key of `FORMATS`.
      smooth: whether maps are interpolated between positions and times.
    """
    shown = rows(layer, query, head)
    rate = min(max(len(frames) / _SECONDS, _SLOWEST), _FASTEST)
    encoded = b""
    for area in _AREAS:
        pictures = [
            _picture(frames, time, crop, shown, layer, query, area, smooth) for time in range(len(frames))
        ]
        encoded = FORMATS[kind](pictures, rate)
        if len(encoded) <= MOST:
            break
    return encoded


def _picture(
    frames: np.ndarray,
    time: int,
    crop: Crop,
    shown: Sequence[Row],
    layer: Layer,
    query: Query,
    area: int,
    smooth: bool,
) -> np.ndarray:
    """One frame beside its overlays."""
    aspect = min(max(frames.shape[2] / frames.shape[1], 1 / 3), 3.0)
    height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    frame = overlay.enlarged(frames[time], height, width)
    tiles = [("input", overlay.dimmed(frame, crop))]
    for number, row in enumerate(shown):
        values = _at_time(row.maps, (time + 0.5) / len(frames), smooth)
        name = "correlation" if not number else "final map" if number == len(shown) - 1 else _kernel(row)
        tiles.append((name, overlay.overlaid(frame, values, Scale.of(row.maps), crop, smooth=smooth)))
    marked = int((time + 0.5) / len(frames) * layer.grid[0]) == query.position[0]
    cell = _cell(layer, query, crop, height, width) if marked else None
    return _sheet(tiles, cell)


def _kernel(row: Row) -> str:
    return row.label.replace("attention of structure ", "")


def _at_time(maps: np.ndarray, share: float, smooth: bool) -> np.ndarray:
    """The map [rows, columns] at a fraction of the clip."""
    if not smooth:
        return maps[min(int(share * len(maps)), len(maps) - 1)]
    at = min(max(share * len(maps) - 0.5, 0.0), len(maps) - 1.0)
    low = int(at)
    return maps[low] + (at - low) * (maps[min(low + 1, len(maps) - 1)] - maps[low])


def _cell(layer: Layer, query: Query, crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """The query's cell in a tile: left, top, right, bottom."""
    rows_, columns = layer.grid[-2:]
    row, column = query.position[-2:]
    left, right = (crop.left + (column + end) / columns * crop.width for end in (0, 1))
    top, bottom = (crop.top + (row + end) / rows_ * crop.height for end in (0, 1))
    return round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1


def _sheet(tiles: Sequence[tuple[str, np.ndarray]], cell: tuple[int, int, int, int] | None) -> np.ndarray:
    """Tiles with titles, in lines of `_ACROSS`: uint8 [height, width, 3], of even sides for video codecs."""
    height, width = tiles[0][1].shape[:2]
    columns = min(_ACROSS, len(tiles))
    lines = math.ceil(len(tiles) / columns)
    size = (columns * (width + _GAP) + _GAP, lines * (height + _TITLE + _GAP) + _GAP)
    sheet = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (name, tile) in enumerate(tiles):
        left = _GAP + number % columns * (width + _GAP)
        top = _GAP + number // columns * (height + _TITLE + _GAP)
        brush.text((left, top), name, "black", font)
        sheet.paste(Image.fromarray(tile), (left, top + _TITLE))
        if cell:
            moved = [at + by for at, by in zip(cell, 2 * (left, top + _TITLE), strict=True)]
            brush.rectangle(moved, outline="#d95f02", width=2)
    return np.asarray(sheet)


def _gif(pictures: Sequence[np.ndarray], rate: float) -> bytes:
    file = io.BytesIO()
    first, *others = (Image.fromarray(picture) for picture in pictures)
    options = {"save_all": True, "append_images": others, "loop": 0, "optimize": False}
    first.save(file, "GIF", duration=round(1000 / rate), **options)
    return file.getvalue()


def _mp4(pictures: Sequence[np.ndarray], rate: float) -> bytes:
    file = io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=fractions.Fraction(rate).limit_denominator(100))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in [*pictures] * _REPEATS:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


FORMATS: dict[str, Callable[[Sequence[np.ndarray], float], bytes]] = {"gif": _gif, "mp4": _mp4}
