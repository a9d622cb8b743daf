"""Draw the maps of one query as an animation: the frames and their overlays play beside each other."""

from __future__ import annotations

import fractions
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.drawing import Drawing, Row
from structvit_jax.analysis.explain.overlay import Scale

if TYPE_CHECKING:
    from av.video.stream import VideoStream

MAX_BYTES = 8 * 2**20  # of a file; tiles shrink until it fits
_AREAS = (240**2, 170**2, 120**2, 80**2)  # pixels of a tile, in the order in which they are tried
_COLUMNS = 4  # tiles beside each other
_GAP, _TITLE_HEIGHT = 6, 18  # pixels
_DURATION, _MIN_RATE, _MAX_RATE = 2.5, 2.0, 12.0  # seconds of a clip; frames per second
_MP4_LOOPS = 3  # players do not repeat an MP4 by themselves


def draw(drawing: Drawing, kind: str) -> bytes:
    """Return the animation as a file of kind "gif" or "mp4"."""
    rows, count = drawing.rows(), len(drawing.frames)
    rate = min(max(count / _DURATION, _MIN_RATE), _MAX_RATE)
    content = b""
    for area in _AREAS:
        content = ENCODERS[kind]([_frame(drawing, rows, time, area) for time in range(count)], rate)
        if len(content) <= MAX_BYTES:
            break
    return content


def _frame(drawing: Drawing, rows: Sequence[Row], time: int, area: int) -> np.ndarray:
    """Return one frame beside its overlays."""
    frames, crop = drawing.frames, drawing.crop
    aspect = min(max(frames.shape[2] / frames.shape[1], 1 / 3), 3.0)
    height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    frame, at = overlay.resized_frame(frames[time], height, width), (time + 0.5) / len(frames)
    tiles = {"input": overlay.dimmed(frame, crop)}
    for row in rows:
        values = _at_time(row.values, at, drawing.smooth)
        tiles[row.short_label] = overlay.overlaid(
            frame, values, Scale.of(row.values), crop, smooth=drawing.smooth
        )
    is_query_time = int(at * drawing.grid[0]) == drawing.position[0]
    cell = drawing.cell
    left, top = round(cell.left * width), round(cell.top * height)
    right, bottom = round((cell.left + cell.width) * width), round((cell.top + cell.height) * height)
    return _sheet(tiles, (left, top, right - 1, bottom - 1) if is_query_time else None)


def _at_time(values: np.ndarray, at: float, smooth: bool) -> np.ndarray:
    """Return the map [height, width] at a fraction of the clip."""
    if not smooth:
        return values[min(int(at * len(values)), len(values) - 1)]
    exact = min(max(at * len(values) - 0.5, 0.0), len(values) - 1.0)
    low = int(exact)
    return values[low] + (exact - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def _sheet(tiles: dict[str, np.ndarray], cell: tuple[int, int, int, int] | None) -> np.ndarray:
    """Return titled tiles in lines of `_COLUMNS`: uint8 [height, width, 3], of even sides for video codecs.

    Args:
      tiles: by title.
      cell: left, top, right and bottom of a box to draw into each tile.
    """
    height, width = next(iter(tiles.values())).shape[:2]
    columns = min(_COLUMNS, len(tiles))
    lines = math.ceil(len(tiles) / columns)
    sides = columns * (width + _GAP) + _GAP, lines * (height + _TITLE_HEIGHT + _GAP) + _GAP
    sheet = Image.new("RGB", (sides[0] + sides[0] % 2, sides[1] + sides[1] % 2), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (title, tile) in enumerate(tiles.items()):
        left = _GAP + number % columns * (width + _GAP)
        top = _GAP + number // columns * (height + _TITLE_HEIGHT + _GAP)
        brush.text((left, top), title, "black", font)
        top += _TITLE_HEIGHT
        sheet.paste(Image.fromarray(tile), (left, top))
        if cell:
            moved = (cell[0] + left, cell[1] + top, cell[2] + left, cell[3] + top)
            brush.rectangle(moved, outline="#d95f02", width=2)
    return np.asarray(sheet)


def _encode_gif(frames: Sequence[np.ndarray], rate: float) -> bytes:
    file = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(
        file, "GIF", save_all=True, append_images=others, loop=0, optimize=False, duration=round(1000 / rate)
    )
    return file.getvalue()


def _encode_mp4(frames: Sequence[np.ndarray], rate: float) -> bytes:
    file = io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        exact = fractions.Fraction(rate).limit_denominator(100)
        stream = cast("VideoStream", container.add_stream(codec, rate=exact))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in [*frames] * _MP4_LOOPS:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


ENCODERS: dict[str, Callable[[Sequence[np.ndarray], float], bytes]] = {"gif": _encode_gif, "mp4": _encode_mp4}
