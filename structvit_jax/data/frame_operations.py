"""The operations of RandAugment and colour jitter on clips, applied only to the pixels that a crop needs.

Results equal those of Pillow to the last bit. Tables of consecutive operations that replace values (such as
posterize) are composed and looked up once. Operations that depend on the statistics of a frame (such as
equalize) read all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from structvit_jax.data import pixels
from structvit_jax.data.pixels import Box, Fill, Matrix

# float64 [3, 3]: maps a point (x, y, 1) of the output to the point of the input that is shown there. Both are
# in fractions of the width and height.
CropAffine = np.ndarray
_VALUES = np.arange(256, dtype=np.uint8)


class Part(NamedTuple):
    """A box of the frames of a clip.

    Attributes:
      pixels: uint8 [frames, height, width, 3].
      box: the box.
      size: height and width of the whole frames.
      tables: uint8 [frames, 3, 256]; values are yet to be looked up in them. Consecutive look-ups are
        composed until an operation needs the result. None: no look-up.
    """

    pixels: np.ndarray
    box: Box
    size: tuple[int, int]
    tables: np.ndarray | None = None

    def crop(self, box: Box) -> Part:
        """Return a box inside this one; it shares the memory of the pixels."""
        top, left = box[0] - self.box[0], box[1] - self.box[1]
        return self._replace(pixels=self.pixels[:, top : top + box[2], left : left + box[3]], box=box)

    def values(self) -> np.ndarray:
        """Return the pixels after the look-up."""
        return self.pixels if self.tables is None else pixels.look_up(self.pixels, self.tables)

    def replace(self, values: np.ndarray) -> Part:
        """Return a part with other pixels, which need no look-up."""
        return self._replace(pixels=values, tables=None)

    def look_up(self, tables: np.ndarray) -> Part:
        """Add a look-up in tables, uint8 [256], [3, 256] or [frames, 3, 256]."""
        shape = len(self.pixels), 3, 256
        tables = np.broadcast_to(tables, shape)
        if self.tables is not None:
            tables = np.take_along_axis(tables, self.tables.astype(np.intp), axis=2)
        return self._replace(tables=np.ascontiguousarray(tables))


class Operation:
    """An operation with all of its parameters set. It maps all frames of a clip in the same way."""

    def reads(self, box: Box, size: tuple[int, int]) -> Box:
        """Return the box of a frame of this size (height, width) that determines a box of the result."""
        return box

    def affine(self, size: tuple[int, int]) -> CropAffine | None:
        """Return where the pixels of the result of a frame of this size come from; None if they stay."""
        return None

    def __call__(self, part: Part, box: Box) -> Part:
        """Return a box of the result.

        Args:
          part: the part of the frame in the box `reads(box)`.
          box: the box.
        """
        raise NotImplementedError


def apply(operations: Sequence[Operation], clip: np.ndarray, box: Box) -> np.ndarray:
    """Apply operations to all frames of a clip and return a box of the results.

    Args:
      operations: the operations, in this order.
      clip: uint8 [frames, height, width, 3].
      box: the box.

    Returns:
      uint8 [frames, height, width, 3], with the height and width of the box.
    """
    size = clip.shape[1], clip.shape[2]
    boxes = [box]  # the box that each operation has to return, from the last to the first
    for operation in reversed(operations):
        boxes.append(operation.reads(boxes[-1], size))
    part = Part(clip, (0, 0, *size), size).crop(boxes.pop())
    for operation in operations:
        part = operation(part, boxes.pop())
    return part.values()


def affine(operations: Sequence[Operation], size: tuple[int, int]) -> CropAffine:
    """Return where the pixels of the result come from, for frames of this size (height, width)."""
    product: CropAffine = np.eye(3)
    for operation in operations:
        if (moved := operation.affine(size)) is not None:
            product = product @ moved
    return product


class LookUp(Operation):
    """Replace values by those of a table, uint8 [256]."""

    def __init__(self, table: np.ndarray):
        self._table = table

    def __call__(self, part: Part, box: Box) -> Part:
        return part.crop(box).look_up(self._table)


class Adaptive(Operation):
    """Replace values by those of tables that depend on the whole frame."""

    def __init__(self, make_tables: Callable[[Part], np.ndarray]):
        self._make_tables = make_tables

    def reads(self, box: Box, size: tuple[int, int]) -> Box:
        return (0, 0, *size)

    def __call__(self, part: Part, box: Box) -> Part:
        return part.crop(box).look_up(self._make_tables(part))


def _histograms(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the values of a part.

    Returns:
      The counts, int64 [frames, 3, 256]; and the lowest and the highest value, int64 [frames, 3, 1].
    """
    counts = pixels.histograms(part.pixels).astype(np.int64)
    if part.tables is not None:
        before, counts = counts, np.zeros_like(counts)
        frames, channels, _ = np.ogrid[: len(counts), :3, :256]
        np.add.at(counts, (frames, channels, part.tables), before)
    used = counts > 0
    return counts, used.argmax(2, keepdims=True), 255 - used[..., ::-1].argmax(2, keepdims=True)


def _autocontrast(part: Part) -> np.ndarray:
    _, low, high = _histograms(part)
    scale = 255.0 / np.maximum(high - low, 1)
    stretched = np.clip(np.trunc(np.arange(256) * scale + -low * scale), 0, 255)
    return np.where(high > low, stretched, _VALUES).astype(np.uint8)


def _equalize(part: Part) -> np.ndarray:
    counts, _, high = _histograms(part)
    total = counts.sum(2, keepdims=True)
    step = (total - np.take_along_axis(counts, high, 2)) // 255
    below = np.cumsum(counts, axis=2) - counts
    equal = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return np.where(step > 0, equal, _VALUES).astype(np.uint8)


def _blended(grey: np.ndarray, factor: float) -> np.ndarray:
    """Return tables of grey + factor * (value - grey), in float32 as Pillow computes it.

    Args:
      grey: int64 [...]; the result has another axis of 256.
      factor: the factor.
    """
    grey = grey[..., None]
    values = grey.astype(np.float32) + np.float32(factor) * (np.arange(256) - grey).astype(np.float32)
    return np.clip(values, 0, 255).astype(np.uint8)


def _contrast(part: Part, factor: float) -> np.ndarray:
    tables = part.tables
    if tables is None:
        tables = np.tile(_VALUES, (len(part.pixels), 3, 1))
    means = (pixels.mean_lumas(part.pixels, tables) + 0.5).astype(np.int64)
    return _blended(means[:, None], factor)


def autocontrast() -> Operation:
    """Stretch the values of each channel to 0 to 255."""
    return Adaptive(_autocontrast)


def equalize() -> Operation:
    """Make the histogram of each channel uniform."""
    return Adaptive(_equalize)


def invert() -> Operation:
    return LookUp(255 - _VALUES)


def posterize(bits: int) -> Operation:
    """Keep the upper bits of each value."""
    return LookUp(_VALUES & np.uint8(0xFF & ~(2 ** (8 - bits) - 1)))


def solarize(threshold: int) -> Operation:
    """Invert values from the threshold on."""
    return LookUp(np.where(threshold > _VALUES, _VALUES, 255 - _VALUES))


def solarize_add(addend: int) -> Operation:
    """Add to values below 128."""
    return LookUp(np.where(_VALUES < 128, np.minimum(_VALUES + np.uint8(addend), 255), _VALUES))


def brighten(factor: float) -> Operation:
    """Scale all values by a factor."""
    return LookUp(_blended(np.array(0), factor))


def contrast(factor: float) -> Operation:
    """Scale the differences from the mean luma of the frame by a factor."""
    return Adaptive(functools.partial(_contrast, factor=factor))


class Saturate(Operation):
    """Scale the differences from the luma by a factor."""

    def __init__(self, factor: float):
        self._factor = factor

    def __call__(self, part: Part, box: Box) -> Part:
        part = part.crop(box)
        return part.replace(pixels.saturate(part.values(), self._factor))


class Sharpen(Operation):
    """Scale the differences from a smoothed frame by a factor."""

    def __init__(self, factor: float):
        self._factor = factor

    def reads(self, box: Box, size: tuple[int, int]) -> Box:
        top, left, height, width = box
        return _box((top - 1, top + height), (left - 1, left + width), size)

    def __call__(self, part: Part, box: Box) -> Part:
        return part.replace(pixels.sharpen(part.values(), self._factor)).crop(box)


class Warp(Operation):
    """Show at (x, y) the point (m0 x + m1 y + m2, m3 x + m4 y + m5), or `fill` outside the frame."""

    def __init__(self, matrix: Matrix, fill: Fill):
        self._matrix, self._fill = matrix, fill

    def affine(self, size: tuple[int, int]) -> CropAffine | None:
        to_pixels = np.diag([size[1], size[0], 1.0])
        matrix = np.array([*self._matrix, 0, 0, 1], np.float64).reshape(3, 3)
        return np.linalg.inv(to_pixels) @ matrix @ to_pixels

    def reads(self, box: Box, size: tuple[int, int]) -> Box:
        top, left, height, width = box
        a, b, c, d, e, f = self._matrix
        corners = [(x + 0.5, y + 0.5) for x in (left, left + width - 1) for y in (top, top + height - 1)]
        xs, ys = [a * x + b * y + c for x, y in corners], [d * x + e * y + f for x, y in corners]
        # Two pixels on either side are interpolated; one more for rounding.
        rows, columns = ((math.floor(min(v)) - 3, math.floor(max(v)) + 3) for v in (ys, xs))
        return _box(rows, columns, size)

    def __call__(self, part: Part, box: Box) -> Part:
        warped = pixels.warp(part.values(), part.box, part.size, self._matrix, self._fill, box)
        return part.replace(warped)._replace(box=box)


def _box(rows: tuple[int, int], columns: tuple[int, int], size: tuple[int, int]) -> Box:
    """Return the box of these rows and columns (first, last), limited to a frame of this size."""
    top, bottom = (min(max(row, 0), size[0] - 1) for row in rows)
    left, right = (min(max(column, 0), size[1] - 1) for column in columns)
    return top, left, bottom - top + 1, right - left + 1


def shift(dx: float, dy: float, fill: Fill) -> Operation:
    """Show at (x, y) the point (x + dx, y + dy)."""
    return Warp((1, 0, dx, 0, 1, dy), fill)


def shear(x: float, y: float, fill: Fill) -> Operation:
    """Show at (x, y) the point (x + `x` y, y + `y` x)."""
    return Warp((1, x, 0, y, 1, 0), fill)


def rotate(degrees: float, size: tuple[int, int], fill: Fill) -> Operation:
    """Rotate counter-clockwise about the centre of a frame of this size (height, width)."""
    angle, (height, width) = -math.radians(degrees), size
    # Rounded, and in the same order as in Pillow, for equal bits.
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return Warp((cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y), fill)
