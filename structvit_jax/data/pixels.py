"""Pixel operations on all frames of a clip, with the results of Pillow to the last bit but much faster.

pixels.cc implements them. Without a C++ compiler Pillow itself runs. Clips are uint8 [frames, height, width,
3] with contiguous rows. A box is a part of a frame: top, left, height and width in pixels. Tables are uint8
[frames, 3, 256]: the new value of each value, per frame and channel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from structvit_jax.utils import native_library

Box = tuple[int, int, int, int]  # top, left, height, width
Fill = tuple[int, int, int]  # RGB
Matrix = tuple[float, float, float, float, float, float]


class _Clip(ctypes.Structure):
    _fields_ = [
        ("pixels", ctypes.c_void_p),
        ("frame_bytes", ctypes.c_long),
        ("row_bytes", ctypes.c_long),
        ("frames", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
    ]


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
    library.histograms.argtypes = [_Clip, pointer]
    library.luma_sums.argtypes = library.look_up.argtypes = [_Clip, pointer, pointer]
    library.saturate.argtypes = library.sharpen.argtypes = [_Clip, ctypes.c_float, pointer]
    library.resample.argtypes = [_Clip, pointer, integer, integer]
    library.warp.argtypes = [_Clip, *[integer] * 4, pointer, pointer, _Box, pointer]
    return library


def prepare() -> None:
    """Compile the library, if that has not happened yet. Call it before several processes need it."""
    _library()


def _clip(clip: np.ndarray) -> _Clip:
    frames, height, width, channels = clip.shape
    if clip.dtype != np.uint8 or clip.strides[2:] != (3, 1) or channels != 3:
        raise ValueError(f"a clip of {clip.dtype} {clip.shape} with strides {clip.strides}")
    return _Clip(clip.ctypes.data, clip.strides[0], clip.strides[1], frames, height, width)


def _with_pillow(function: Callable[[Image.Image], Image.Image], clip: np.ndarray) -> np.ndarray:
    """Apply a function to every frame."""
    return np.stack([np.asarray(function(Image.fromarray(frame))) for frame in clip])


def histograms(clip: np.ndarray) -> np.ndarray:
    """Count the values of each frame and channel: int32 [frames, 3, 256]."""
    if (library := _library()) is None:
        found = [Image.fromarray(frame).histogram() for frame in clip]
        return np.array(found, np.int32).reshape(-1, 3, 256)
    counts = np.empty((len(clip), 3, 256), np.int32)
    library.histograms(_clip(clip), counts.ctypes.data)
    return counts


def mean_lumas(clip: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return the mean luma of each frame whose values are looked up in tables first: float64 [frames]."""
    if (library := _library()) is None:
        frames = map(Image.fromarray, look_up(clip, tables))
        sums = np.array([frame.convert("L").histogram() for frame in frames]) @ np.arange(256)
    else:
        sums = np.empty(len(clip), np.int64)
        library.luma_sums(_clip(clip), tables.ctypes.data, sums.ctypes.data)
    return sums / (clip.shape[1] * clip.shape[2])


def look_up(clip: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replace each value by the one in the table of its frame and channel."""
    if (library := _library()) is None:
        frames = zip(map(Image.fromarray, clip), tables, strict=True)
        return np.stack([np.asarray(frame.point(table.ravel().tolist())) for frame, table in frames])
    out = np.empty(clip.shape, np.uint8)
    library.look_up(_clip(clip), tables.ctypes.data, out.ctypes.data)
    return out


def saturate(clip: np.ndarray, factor: float) -> np.ndarray:
    """Scale the differences from the luma by a factor."""
    return _enhance("saturate", ImageEnhance.Color, clip, factor)


def sharpen(clip: np.ndarray, factor: float) -> np.ndarray:
    """Scale the differences from smoothed frames by a factor; pixels at the edges stay as they are."""
    return _enhance("sharpen", ImageEnhance.Sharpness, clip, factor)


def _enhance(
    name: str, enhancer: Callable[[Image.Image], ImageEnhance._Enhance], clip: np.ndarray, factor: float
) -> np.ndarray:
    """Apply a function of the library, or the same enhancer of Pillow, to all frames."""
    if (library := _library()) is None:
        return _with_pillow(lambda frame: enhancer(frame).enhance(factor), clip)
    out = np.empty(clip.shape, np.uint8)
    getattr(library, name)(_clip(clip), factor, out.ctypes.data)
    return out


def resample(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one frame, uint8 [height, width, 3], to `size` bicubically with antialiasing."""
    if (library := _library()) is None:
        return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
    out = np.empty((*size, 3), np.uint8)
    library.resample(_clip(frame[None]), out.ctypes.data, *size)
    return out


def warp(
    clip: np.ndarray, source: Box, size: tuple[int, int], matrix: Matrix, fill: Fill, target: Box
) -> np.ndarray:
    """Warp frames and return a box of the results.

    A result shows at (x, y) the point (m0 x + m1 y + m2, m3 x + m4 y + m5) of its frame, interpolated
    bicubically, or `fill` where this lies outside the frame.

    Args:
      clip: the box `source` of every frame, which holds all pixels that the result needs.
      source: that box.
      size: height and width of the frames.
      matrix: m0 to m5.
      fill: colour of points outside the frame.
      target: the box of the results to return.
    """
    top, left, height, width = target
    if (library := _library()) is None:
        frames = np.zeros((len(clip), *size, 3), np.uint8)
        frames[:, source[0] : source[0] + source[2], source[1] : source[1] + source[3]] = clip
        affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        warped = _with_pillow(
            lambda frame: frame.transform(size[::-1], affine, matrix, resample=bicubic, fillcolor=fill),
            frames,
        )
        return warped[:, top : top + height, left : left + width]
    out = np.empty((len(clip), height, width, 3), np.uint8)
    numbers, colour = np.array(matrix, np.float64), np.array(fill, np.uint8)
    pointers = numbers.ctypes.data, colour.ctypes.data
    library.warp(_clip(clip), source[0], source[1], *size, *pointers, _Box(*target), out.ctypes.data)
    return out
