"""Draw maps over frames: colour scales, and translucent maps on grey frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from structvit_jax.data.reader import Crop

CLIPPED = 1  # percent of a map's values at either end that are clipped
SCALES = (
    f"from percentile {CLIPPED} to percentile {100 - CLIPPED} of its values, symmetric about zero if it has"
    " negative ones (unless they lie far from zero)"
)
COLOURS = {"sequential": "inferno", "signed": "RdBu_r", "kernel": "PuOr_r"}  # matplotlib's
_STEPS = 255
_MIN_OPACITY, _MAX_OPACITY = 0.1, 0.8  # of a map over a frame
_MARGIN = 0.12  # fraction of a crop's side that is shown around it
_MIN_RANGE = 1e-3  # fraction of the largest value; maps with a smaller range get one colour


class Scale(NamedTuple):
    """The range of values of a colour scale."""

    low: float
    high: float
    signed: bool  # diverging colours, symmetric about zero

    @classmethod
    def of(cls, values: np.ndarray) -> Scale:
        """Return the scale of a map; `CLIPPED` percent of its values at either end lie outside.

        It is symmetric about zero if there are negative values, unless less than a quarter of the colours
        would be used. Otherwise it runs from the lowest to the highest value.
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
        """The key of `COLOURS`."""
        return "signed" if self.signed else "sequential"

    def fractions(self, values: np.ndarray) -> np.ndarray:
        """Return positions on the scale, from 0 to 1."""
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


def stops(name: str, *, over: bool = False) -> np.ndarray:
    """Return a colour map of `COLOURS` in equal steps: uint8 [256, 4], RGBA.

    With `over`, for drawing over a frame, low values are nearly transparent, or values near zero if signed.
    """
    from matplotlib import colormaps  # lazy: it takes half a second

    at = np.linspace(0, 1, _STEPS + 1)
    strength = np.abs(2 * at - 1) if name != "sequential" else at
    colours = colormaps[COLOURS[name]](at)
    if over and name == "sequential":
        colours = colormaps[COLOURS[name]](0.25 + 0.7 * at)  # neither black nor white
    colours[:, 3] = _MIN_OPACITY + (_MAX_OPACITY - _MIN_OPACITY) * strength if over else 1
    return (255 * colours).round().astype(np.uint8)


def coloured(fractions: np.ndarray, name: str, *, over: bool = False) -> np.ndarray:
    """Return the colours of positions from 0 to 1: uint8 [..., 4]."""
    return stops(name, over=over)[(fractions * _STEPS).round().astype(int)]


def _resized_map(array: np.ndarray, height: int, width: int, *, smooth: bool) -> np.ndarray:
    """Resize a map [rows, columns]: bicubic if smooth, otherwise to cells of one value."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array.astype(np.float32)).resize((width, height), how))


def resized_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a frame; enlarged pixels stay visible."""
    how = Image.Resampling.NEAREST if frame.shape[0] < height else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize((width, height), how))


def box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of a crop in pixels, at least one pixel large."""
    top, left = round(crop.top * height), round(crop.left * width)
    bottom, right = round((crop.top + crop.height) * height), round((crop.left + crop.width) * width)
    return top, left, max(bottom, top + 1), max(right, left + 1)


def trimmed(frames: np.ndarray, crops: Sequence[Crop]) -> tuple[np.ndarray, list[Crop]]:
    """Cut the frames [time, height, width, 3] to the crops and a margin; return them and the moved crops."""
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
    """Return a frame that is darkened outside the crop."""
    top, left, bottom, right = box(crop, *frame.shape[:2])
    dark = (frame * 0.35).astype(np.uint8)
    dark[top:bottom, left:right] = frame[top:bottom, left:right]
    return dark


def overlaid(frame: np.ndarray, array: np.ndarray, scale: Scale, crop: Crop, *, smooth: bool) -> np.ndarray:
    """Return a grey frame with a map over the crop that the model saw.

    Args:
      frame: uint8 [height, width, 3].
      array: the map [rows, columns] of the crop.
      scale: of the map at all times.
      crop: of the frame.
      smooth: whether the map is interpolated between positions.
    """
    grey = np.asarray(Image.fromarray(frame).convert("L"), np.float32)
    picture = np.repeat(
        40 + 0.8 * grey[..., None], 3, axis=-1
    )  # without black, which would hide dark colours
    top, left, bottom, right = box(crop, *frame.shape[:2])
    values = scale.fractions(_resized_map(array, bottom - top, right - left, smooth=smooth))
    *colour, opacity = np.moveaxis(coloured(values, scale.colours, over=True).astype(np.float32), -1, 0)
    opacity = opacity[..., None] / 255
    part = picture[top:bottom, left:right]
    picture[top:bottom, left:right] = part + opacity * (np.stack(colour, axis=-1) - part)
    return dimmed(picture.round().clip(0, 255).astype(np.uint8), crop)
