"""What an example's frames are read from: a video file, a folder of frames, one image, or encoded bytes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Protocol

import cv2
import numpy as np
from PIL import Image, ImageOps

from structvit_jax.data.video import VideoFile, check_there, stack
from structvit_jax.errors import DecodeError, decoding

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")

cv2.setNumThreads(1)  # workers are the parallelism


class Media(Protocol):
    """Frames 0 to count - 1, in the order they are shown; `missing` of them, at the end, are lost."""

    count: int
    missing: int

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        """uint8 [len(wanted), height, width, 3], RGB; longer short sides are scaled to `short_side`.

        Raises:
          DecodeError: one of them cannot be read.
        """
        ...

    def close(self) -> None:
        """Frees what it holds open."""
        ...


class Part:
    """Some of another's frames: `count` from `first` on, the last `missing` of them lost."""

    def __init__(self, media: Media, first: int, count: int, missing: int):
        self._media, self._first, self.count, self.missing = media, first, count, missing

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        check_there(wanted, self.count, self.missing)
        return self._media.frames([self._first + index for index in wanted], short_side)

    def close(self) -> None:
        self._media.close()


def open_media(path: str, start: float | None = None, end: float | None = None) -> Media:
    """The frames of a file or of a folder of frames, or of the part from `start` to `end` seconds.

    Raises:
      DecodeError: it cannot be read.
    """
    if path.lower().endswith(IMAGES):
        return Pictures([path])
    if os.path.isdir(path) and (names := frame_names(os.listdir(path))):
        if start is not None or end is not None:
            raise DecodeError("a folder of frames has no seconds to start or end at")
        return Pictures([os.path.join(path, name) for name in names])
    return VideoFile(path, start, end)


def frame_names(names: Sequence[str]) -> list[str]:
    """The images among them, numbers counted as numbers: 2.jpg comes before 10.jpg."""
    images = [name for name in names if name.lower().endswith(IMAGES) and not name.startswith(".")]
    return sorted(images, key=lambda name: [int(part) if part.isdigit() else part for part in _parts(name)])


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", PurePath(name).stem)


class Pictures:
    """Encoded images, as paths or bytes, that are the frames of one example."""

    missing = 0

    def __init__(self, files: Sequence[str | bytes]):
        self._files, self.count = files, len(files)

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        distinct = {int(index): _decode(self._files[index], short_side) for index in wanted}
        return stack([distinct[int(index)] for index in wanted])

    def close(self) -> None:
        """Files are open only while they are read."""


class Decoded:
    """Frames made in memory: uint8 [count, height, width, 3]."""

    missing = 0

    def __init__(self, pictures: np.ndarray):
        self._pictures, self.count = pictures, len(pictures)

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        del short_side  # they are small
        return self._pictures[list(wanted)]

    def close(self) -> None:
        """Nothing is open."""


def _decode(file: str | bytes, short_side: int) -> np.ndarray:
    with decoding():
        if isinstance(file, str) and not os.path.getsize(file):
            raise DecodeError("empty file")
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    scale = short_side / min(picture.shape[:2]) if short_side else 1
    if scale >= 1:
        return picture
    height, width = (round(side * scale) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)


def without_extension(name: str) -> str:
    """A file's name without what says its encoding, so that one clip is called the same in any of them."""
    stem, dot, extension = name.rpartition(".")
    return stem if f"{dot}{extension}".lower() in IMAGES + VIDEOS else name
