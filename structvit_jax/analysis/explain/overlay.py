"""Draw maps over frames: colour scales, translucent maps on grey frames, and marked cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from structvit_jax.data.reader import Crop

CLIPPED = 1  # percent of the values of a map that are clipped at each end
SCALES = (
    f"from percentile {CLIPPED} to percentile {100 - CLIPPED} of its values; symmetric about zero if there"
    " are negative values, unless all values are far from zero compared with their range"
)
COLOURS = {"sequential": "inferno", "signed": "RdBu_r", "kernel": "PuOr_r"}  # matplotlib's names
WHOLE = Crop(0, 0, 1, 1)
_STEPS = 255
_MIN_OPACITY, _MAX_OPACITY = 0.1, 0.8  # of a map over a frame
_MARGIN = 0.12  # width of the border shown around a crop, as a fraction of its side
_MIN_RANGE = 1e-3  # a map with a smaller range, relative to its largest value, gets one colour


class Scale(NamedTuple):
    """A colour scale: the range of values, and the type of colours."""

    low: float
    high: float
    signed: bool  # use diverging colours, symmetric about zero

    @classmethod
    def of(cls, values: np.ndarray) -> Scale:
        """Return the scale of a map, which clips `CLIPPED` percent of its values at each end.

        If there are negative values and the remaining values use at least a quarter of a scale that is
        symmetric about zero, the scale is that one. Otherwise it runs from the lowest to the highest of the
        remaining values.
        """
        low, high = map(float, np.percentile(values, [CLIPPED, 100 - CLIPPED]))
        largest = max(abs(low), abs(high))
        if high - low <= _MIN_RANGE * largest:
            low = high = float(np.median(values))
        elif low < 0 and high - low >= largest / 2:
            return cls(-largest, largest, True)
        return cls(low, high, False)

    @property
    def is_constant(self) -> bool:
        """Whether the map has (nearly) one value everywhere."""
        return self.low == self.high

    @property
    def colours(self) -> str:
        """The colour map, as a key of `COLOURS`."""
        return "signed" if self.signed else "sequential"

    def fractions(self, values: np.ndarray) -> np.ndarray:
        """Return the positions of values on the scale, from 0 to 1."""
        if self.is_constant:
            return np.full(values.shape, 0.5)
        return np.clip((values - self.low) / (self.high - self.low), 0, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (position, label) of the ticks of a colour bar, with enough digits to differ."""
        if self.is_constant:
            return [(0.5, f"{self.low:.2g}")]
        ratio = max(abs(self.low), abs(self.high)) / (self.high - self.low)
        digits = 2 + max(0, round(math.log10(ratio)))
        ticks = [(0.0, f"{self.low:.{digits}g}"), (1.0, f"{self.high:.{digits}g}")]
        return [ticks[0], (0.5, "0"), ticks[1]] if self.signed else ticks


def colour_table(name: str, *, translucent: bool = False) -> np.ndarray:
    """Return the colour map `COLOURS[name]` as a table: uint8 [256, 4], RGBA.

    A translucent table is for drawing over a frame. It is nearly transparent at low values ("sequential") or
    at values near zero (the other colour maps).
    """
    from matplotlib import colormaps  # imported here because it takes half a second

    at = np.linspace(0, 1, _STEPS + 1)
    strength = at if name == "sequential" else np.abs(2 * at - 1)
    if translucent and name == "sequential":
        at = 0.25 + 0.7 * at  # neither black nor white
    colours = colormaps[COLOURS[name]](at)
    colours[:, 3] = _MIN_OPACITY + (_MAX_OPACITY - _MIN_OPACITY) * strength if translucent else 1
    return (255 * colours).round().astype(np.uint8)


def coloured(fractions: np.ndarray, name: str, *, translucent: bool = False) -> np.ndarray:
    """Return the colours of positions from 0 to 1: uint8 [..., 4]."""
    return colour_table(name, translucent=translucent)[(fractions * _STEPS).round().astype(int)]


def resized_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a frame. Enlarging does not interpolate, so that single pixels stay visible."""
    method = Image.Resampling.NEAREST if frame.shape[0] < height else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize((width, height), method))


def box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of a crop in pixels; each side is at least one pixel."""
    top, left = round(crop.top * height), round(crop.left * width)
    bottom, right = round((crop.top + crop.height) * height), round((crop.left + crop.width) * width)
    return top, left, max(bottom, top + 1), max(right, left + 1)


def trimmed(frames: np.ndarray, crops: Sequence[Crop]) -> tuple[np.ndarray, list[Crop]]:
    """Cut frames to the smallest box that contains all crops, plus a margin.

    Args:
      frames: [time, height, width, 3].
      crops: in fractions of the frames' sides.

    Returns:
      The cut frames, and the crops in fractions of the sides of the cut frames.
    """
    size = np.array(frames.shape[1:3])
    corners = np.array(crops)[:, :2]  # top and left
    sides = np.array(crops)[:, 2:]
    low, high = corners.min(axis=0), (corners + sides).max(axis=0)
    margin = _MARGIN * (high - low)
    start = np.maximum((low - margin) * size, 0).astype(int)
    stop = np.minimum(np.ceil((high + margin) * size), size).astype(int)
    moved = np.hstack([corners * size - start, sides * size]) / np.tile(stop - start, 2)
    return frames[:, start[0] : stop[0], start[1] : stop[1]], [Crop(*crop) for crop in moved.tolist()]


def dimmed(frame: np.ndarray, crop: Crop) -> np.ndarray:
    """Return a frame with the area outside the crop darkened."""
    top, left, bottom, right = box(crop, *frame.shape[:2])
    dark = (frame * 0.35).astype(np.uint8)
    dark[top:bottom, left:right] = frame[top:bottom, left:right]
    return dark


def overlaid(frame: np.ndarray, values: np.ndarray, scale: Scale, crop: Crop, *, smooth: bool) -> np.ndarray:
    """Return the frame in grey, with a map drawn over the crop that the model saw: uint8 [height, width, 3].

    Args:
      frame: uint8 [height, width, 3].
      values: the map of the crop, [rows, columns].
      scale: the scale of the map over all time positions.
      crop: the part of the frame that the model saw.
      smooth: interpolate between positions; otherwise each position is a cell of one colour.
    """
    grey = (
        Image.fromarray(frame).convert("L").point(lambda value: 40 + 0.8 * value)
    )  # brighten dark pixels, on which a map is invisible
    top, left, bottom, right = box(crop, *frame.shape[:2])
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    resized = Image.fromarray(values.astype(np.float32)).resize((right - left, bottom - top), method)
    colours = coloured(scale.fractions(np.asarray(resized)), scale.colours, translucent=True)
    picture = grey.convert("RGBA")
    picture.alpha_composite(Image.fromarray(colours), (left, top))
    return dimmed(np.asarray(picture.convert("RGB")), crop)


def marked(image: np.ndarray, cell: Crop) -> np.ndarray:
    """Return an image with a box around a cell."""
    picture = Image.fromarray(image)
    top, left, bottom, right = box(cell, *image.shape[:2])
    for colour, outside, width in (("white", 2, 4), ("#d95f02", 1, 2)):  # orange with a white edge
        edges = (left - outside, top - outside, right - 1 + outside, bottom - 1 + outside)
        ImageDraw.Draw(picture).rectangle(edges, outline=colour, width=width)
    return np.asarray(picture)
