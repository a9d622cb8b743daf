"""Draw maps over frames: the scale of a map, its colours, and a translucent map on a grey frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from structvit_jax.data.reader import Crop

CLIPPED = 1  # percent of a map's values at either end that are drawn like the ends
SCALES = (
    f"from percentile {CLIPPED} to percentile {100 - CLIPPED} of its values, symmetric about zero if it has"
    " negative ones (unless they lie far from zero)"
)
COLOURS = {"sequential": "inferno", "signed": "RdBu_r", "kernel": "PuOr_r"}  # matplotlib's
_STEPS = 255
_FAINTEST, _STRONGEST = 0.1, 0.8  # opacity of a map over a frame
_MARGIN = 0.12  # of a crop's side, shown around it
_EVEN = 1e-3  # of the largest value; maps that vary less are drawn in one colour


class Scale(NamedTuple):
    """The values at the ends of a map's colours."""

    low: float
    high: float
    signed: bool  # diverging colours, symmetric about zero

    @classmethod
    def of(cls, values: np.ndarray) -> Scale:
        """Return the scale of a map, without the `CLIPPED` percent of its values at either end.

        A map with negative values gets a scale symmetric about zero, unless its values lie so far from zero
        that less than a quarter of the colours would be used. Other maps get one from the lowest to the
        highest value.
        """
        low, high = map(float, np.percentile(values, [CLIPPED, 100 - CLIPPED]))
        most = max(abs(low), abs(high))
        if high - low <= _EVEN * most:
            low = high = float(np.median(values))
        elif low < 0 and high - low >= most / 2:
            return cls(-most, most, True)
        return cls(low, high, False)

    @property
    def even(self) -> bool:
        """Whether the map has one value everywhere."""
        return self.low == self.high

    @property
    def colours(self) -> str:
        return "signed" if self.signed else "sequential"

    def fractions(self, values: np.ndarray) -> np.ndarray:
        """Return where values lie on the scale, from 0 to 1."""
        if self.even:
            return np.full(values.shape, 0.5)
        return np.clip((values - self.low) / (self.high - self.low), 0, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (fraction, number) of what is written beside the colour bar: enough digits to differ."""
        if self.even:
            return [(0.5, f"{self.low:.2g}")]
        wide = max(abs(self.low), abs(self.high)) / (self.high - self.low)
        digits = 2 + max(0, round(math.log10(wide)))
        ticks = [(0.0, f"{self.low:.{digits}g}"), (1.0, f"{self.high:.{digits}g}")]
        return [ticks[0], (0.5, "0"), ticks[1]] if self.signed else ticks


def stops(name: str, *, over: bool = False) -> np.ndarray:
    """Return the colours of `COLOURS` at equal distances: uint8 [256, 4], red, green, blue and opacity.

    Over a frame, what a map has little of is nearly transparent: low values, or those near zero if signed.
    """
    from matplotlib import colormaps  # imported here: it takes half a second

    at = np.linspace(0, 1, _STEPS + 1)
    strength = np.abs(2 * at - 1) if name != "sequential" else at
    colours = colormaps[COLOURS[name]](at)
    if over and name == "sequential":
        colours = colormaps[COLOURS[name]](0.25 + 0.7 * at)  # neither black nor white
    colours[:, 3] = _FAINTEST + (_STRONGEST - _FAINTEST) * strength if over else 1
    return (255 * colours).round().astype(np.uint8)


def coloured(fractions: np.ndarray, name: str, *, over: bool = False) -> np.ndarray:
    """Return the colours of fractions from 0 to 1: uint8 [..., 4]."""
    return stops(name, over=over)[(fractions * _STEPS).round().astype(int)]


def resized(array: np.ndarray, height: int, width: int, *, smooth: bool) -> np.ndarray:
    """Return a map [rows, columns] at another size: bicubic if smooth, otherwise of equal cells."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array.astype(np.float32)).resize((width, height), how))


def enlarged(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a frame at another size; pixels of small pictures stay visible."""
    small = frame.shape[0] < height
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize((width, height), how))


def box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of a crop in a picture of this size, in whole pixels."""
    top, left = round(crop.top * height), round(crop.left * width)
    bottom, right = round((crop.top + crop.height) * height), round((crop.left + crop.width) * width)
    return top, left, max(bottom, top + 1), max(right, left + 1)


def trimmed(frames: np.ndarray, crops: Sequence[Crop]) -> tuple[np.ndarray, list[Crop]]:
    """Return the part of the frames [time, height, width, 3] around the crops, and the crops in it."""
    sides = []
    for axis in (0, 1):
        low = min(crop[axis] for crop in crops)
        high = max(crop[axis] + crop[axis + 2] for crop in crops)
        margin, length = _MARGIN * (high - low), frames.shape[axis + 1]
        sides.append((max(0, int((low - margin) * length)), min(length, math.ceil((high + margin) * length))))
    (top, bottom), (left, right) = sides
    (height, width), (all_rows, all_columns) = (bottom - top, right - left), frames.shape[1:3]
    moved = [
        Crop(
            (crop.top * all_rows - top) / height,
            (crop.left * all_columns - left) / width,
            crop.height * all_rows / height,
            crop.width * all_columns / width,
        )
        for crop in crops
    ]
    return frames[:, top:bottom, left:right], moved


def dimmed(frame: np.ndarray, crop: Crop) -> np.ndarray:
    """Return a frame with what lies outside the crop darkened."""
    top, left, bottom, right = box(crop, *frame.shape[:2])
    seen = (frame * 0.35).astype(np.uint8)
    seen[top:bottom, left:right] = frame[top:bottom, left:right]
    return seen


def overlaid(frame: np.ndarray, array: np.ndarray, scale: Scale, crop: Crop, *, smooth: bool) -> np.ndarray:
    """Return a grey frame with a map over the part that the model saw.

    Args:
      frame: uint8 [height, width, 3].
      array: the map [rows, columns] of the crop.
      scale: of the whole map, all times.
      crop: of the frame.
      smooth: whether colours change gradually from position to position, or in cells.
    """
    grey = np.asarray(Image.fromarray(frame).convert("L"), np.float32)
    picture = np.repeat(40 + 0.8 * grey[..., None], 3, axis=-1)  # no black, in which dark colours would drown
    top, left, bottom, right = box(crop, *frame.shape[:2])
    values = scale.fractions(resized(array, bottom - top, right - left, smooth=smooth))
    *colour, opacity = np.moveaxis(coloured(values, scale.colours, over=True).astype(np.float32), -1, 0)
    share = opacity[..., None] / 255
    part = picture[top:bottom, left:right]
    picture[top:bottom, left:right] = part + share * (np.stack(colour, axis=-1) - part)
    return dimmed(picture.round().clip(0, 255).astype(np.uint8), crop)
