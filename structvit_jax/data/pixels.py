"""Pixel operations on one frame, with the results of Pillow to the last bit but several times as fast.

pixels.cc implements them. Without a C++ compiler Pillow itself runs. Frames are uint8 [height, width, 3] with
contiguous rows. A box is a part of a frame: top, left, height and width in pixels. Tables are uint8 [3, 256]:
the new value of each value, per channel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from structvit_jax.utils import native_library

Box = tuple[int, int, int, int]  # top, left, height, width
Fill = tuple[int, int, int]  # RGB
Matrix = tuple[float, float, float, float, float, float]


class _Box(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("top", "left", "height", "width")]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it cannot be compiled; the first call takes a few seconds."""
    try:
        # Pillow's wheels are built without fused multiply-adds, whose results differ in the last bits.
        library = native_library.load(
            "pixels", [Path(__file__).with_suffix(".cc")], ["-ffp-contract=off", "-fno-trapping-math"]
        )
    except native_library.FAILURES:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    rows: list[Any] = [pointer, ctypes.c_long]
    pixels = [*rows, integer, integer]
    library.histograms.argtypes = [*pixels, pointer]
    library.luma_sum.argtypes, library.luma_sum.restype = [*pixels, pointer], ctypes.c_int64
    library.look_up.argtypes = [*pixels, pointer, pointer]
    library.saturate.argtypes = library.sharpen.argtypes = [*pixels, ctypes.c_float, pointer]
    library.resample.argtypes = [*pixels, pointer, integer, integer]
    library.warp.argtypes = [*rows, _Box, integer, integer, pointer, pointer, _Box, pointer]
    return library


def prepare() -> None:
    """Compile the library, if that has not happened yet. Call it before several processes need it."""
    _library()


def _pixels(frame: np.ndarray) -> tuple[int, int, int, int]:
    """Return the arguments that describe a frame: address, bytes from row to row, height and width."""
    height, width, channels = frame.shape
    if frame.dtype != np.uint8 or frame.strides[1:] != (3, 1) or channels != 3:
        raise ValueError(f"a frame of {frame.dtype} {frame.shape} with strides {frame.strides}")
    return frame.ctypes.data, frame.strides[0], height, width


def histograms(frame: np.ndarray) -> np.ndarray:
    """Count the values of each channel: int32 [3, 256]."""
    if (library := _library()) is None:
        return np.array(Image.fromarray(frame).histogram(), np.int32).reshape(3, 256)
    counts = np.empty((3, 256), np.int32)
    library.histograms(*_pixels(frame), counts.ctypes.data)
    return counts


def mean_luma(frame: np.ndarray, tables: np.ndarray) -> float:
    """Return the mean luma of a frame whose values are looked up in tables first."""
    height, width, _ = frame.shape
    if (library := _library()) is None:
        counts = Image.fromarray(look_up(frame, tables)).convert("L").histogram()
        total = sum(value * count for value, count in enumerate(counts))
    else:
        total = library.luma_sum(*_pixels(frame), tables.ctypes.data)
    return total / (height * width)


def look_up(frame: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replace each value by the one in the table of its channel."""
    if (library := _library()) is None:
        return np.asarray(Image.fromarray(frame).point(tables.ravel().tolist()))
    out = np.empty(frame.shape, np.uint8)
    library.look_up(*_pixels(frame), tables.ctypes.data, out.ctypes.data)
    return out


def saturate(frame: np.ndarray, factor: float) -> np.ndarray:
    """Scale the differences from the luma by a factor."""
    if (library := _library()) is None:
        return np.asarray(ImageEnhance.Color(Image.fromarray(frame)).enhance(factor))
    out = np.empty(frame.shape, np.uint8)
    library.saturate(*_pixels(frame), factor, out.ctypes.data)
    return out


def sharpen(frame: np.ndarray, factor: float) -> np.ndarray:
    """Scale the differences from a smoothed frame by a factor; pixels at the edge stay as they are."""
    if (library := _library()) is None:
        return np.asarray(ImageEnhance.Sharpness(Image.fromarray(frame)).enhance(factor))
    out = np.empty(frame.shape, np.uint8)
    library.sharpen(*_pixels(frame), factor, out.ctypes.data)
    return out


def resample(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a frame to `size` (height, width), bicubically with antialiasing."""
    if (library := _library()) is None:
        return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
    out = np.empty((*size, 3), np.uint8)
    library.resample(*_pixels(frame), out.ctypes.data, *size)
    return out


def warp(
    part: np.ndarray, source: Box, size: tuple[int, int], matrix: Matrix, fill: Fill, target: Box
) -> np.ndarray:
    """Warp a frame and return a box of the result.

    The result shows at (x, y) the point (m0 x + m1 y + m2, m3 x + m4 y + m5) of the frame, interpolated
    bicubically, or `fill` where this lies outside the frame.

    Args:
      part: pixels of the box `source` of the frame, which holds all pixels that the result needs.
      source: that box.
      size: height and width of the frame.
      matrix: m0 to m5.
      fill: colour of points outside the frame.
      target: the box of the result to return.
    """
    top, left, height, width = target
    if (library := _library()) is None:
        frame = np.zeros((*size, 3), np.uint8)
        frame[source[0] : source[0] + source[2], source[1] : source[1] + source[3]] = part
        affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        image = Image.fromarray(frame).transform(size[::-1], affine, matrix, resample=bicubic, fillcolor=fill)
        return np.asarray(image)[top : top + height, left : left + width]
    out = np.empty((height, width, 3), np.uint8)
    pointers = _doubles(matrix), _bytes(fill)
    library.warp(
        *_pixels(part)[:2],
        _Box(*source),
        *size,
        *(pointer.ctypes.data for pointer in pointers),
        _Box(*target),
        out.ctypes.data,
    )
    return out


def _doubles(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float64)


def _bytes(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.uint8)
