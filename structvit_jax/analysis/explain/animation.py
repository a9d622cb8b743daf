"""Draw the maps of one query as an animation: the frames and their overlays play side by side."""

from __future__ import annotations

import fractions
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import av
import numpy as np
from PIL import Image

from structvit_jax.analysis.contact_sheet import contact_sheet
from structvit_jax.analysis.explain.overlay import Scale, dimmed, marked, overlaid, resized_frame
from structvit_jax.analysis.explain.picture import Drawing, MapRow

if TYPE_CHECKING:
    from av.video.stream import VideoStream

MAX_BYTES = 8 * 2**20  # target size of a file; tiles shrink until it fits or the smallest size is reached
_AREAS = (240**2, 170**2, 120**2, 80**2)  # tile sizes to try, in pixels
_COLUMNS = 4  # tiles side by side
_DURATION = 2.5  # seconds that a clip should take
_MIN_RATE, _MAX_RATE = 2.0, 12.0  # frames per second
_MP4_LOOPS = 3  # unlike a GIF, an MP4 does not loop, so the clip is written several times


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


def _frame(drawing: Drawing, rows: Sequence[MapRow], time: int, area: int) -> Image.Image:
    """Return one frame beside its overlays."""
    frames, crop = drawing.frames, drawing.crop
    aspect = min(max(frames.shape[2] / frames.shape[1], 1 / 3), 3.0)
    frame = resized_frame(frames[time], round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect)))
    fraction = (time + 0.5) / len(frames)  # the middle of this frame, as a fraction of the clip
    tiles = [dimmed(frame, crop)]
    for row in rows:
        values = _at_time(row.values, fraction, drawing.smooth)
        tiles.append(overlaid(frame, values, Scale.of(row.values), crop, smooth=drawing.smooth))
    if int(fraction * drawing.grid[0]) == drawing.position[0]:
        tiles = [marked(tile, drawing.cell) for tile in tiles]
    return contact_sheet(tiles, ["input", *(row.short_title for row in rows)], _COLUMNS)


def _at_time(values: np.ndarray, fraction: float, smooth: bool) -> np.ndarray:
    """Return the map [height, width] at a time, given as a fraction of the clip."""
    if not smooth:
        return values[min(int(fraction * len(values)), len(values) - 1)]
    exact = min(max(fraction * len(values) - 0.5, 0.0), len(values) - 1.0)
    before, after = math.floor(exact), math.ceil(exact)
    return values[before] + (exact - before) * (values[after] - values[before])


def _encode_gif(frames: Sequence[Image.Image], rate: float) -> bytes:
    file = io.BytesIO()
    first, *others = frames
    duration = round(1000 / rate)  # of a frame, in milliseconds
    first.save(file, "GIF", save_all=True, append_images=others, loop=0, optimize=False, duration=duration)
    return file.getvalue()


def _encode_mp4(frames: Sequence[Image.Image], rate: float) -> bytes:
    file = io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        exact = fractions.Fraction(rate).limit_denominator(100)
        stream = cast("VideoStream", container.add_stream(codec, rate=exact))
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)  # yuv420p needs even sides
        stream.pix_fmt = "yuv420p"
        for frame in [*frames] * _MP4_LOOPS:
            picture = frame.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return file.getvalue()


_Encoder = Callable[[Sequence[Image.Image], float], bytes]  # (frames, frames per second) -> a file
ENCODERS: dict[str, _Encoder] = {"gif": _encode_gif, "mp4": _encode_mp4}
