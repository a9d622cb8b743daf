"""Open the frames of an example: a video file, a folder of frames, one image, or encoded bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePath

import cv2
import numpy as np

from structvit_jax.data.container import VIDEOS
from structvit_jax.data.image import IMAGES, read_image
from structvit_jax.data.limits import Limits
from structvit_jax.data.types import Media
from structvit_jax.data.video import VideoFile, check_available, stack
from structvit_jax.utils.errors import DecodeError


class FrameRange:
    """`count` frames of other media from frame `first` on, of which the last `missing` are lost."""

    def __init__(self, media: Media, first: int, count: int, missing: int):
        self._media, self._first, self.count, self.missing = media, first, count, missing

    @property
    def repaired(self) -> int:
        return self._media.repaired

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        check_available(wanted, self.count, self.missing)
        return self._media.frames([self._first + index for index in wanted], short_side)

    def close(self) -> None:
        self._media.close()


def open_media(
    path: str,
    start: float | None = None,
    end: float | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Media:
    """Open a file, a folder of frames, or the part of a video from `start` to `end` seconds.

    Raises:
      DecodeError: it cannot be read, or exceeds the limits.
    """
    if path.lower().endswith(IMAGES):
        return Pictures([path], limits)
    if os.path.isdir(path) and (names := frame_names(os.listdir(path))):
        if start is not None or end is not None:
            raise DecodeError("a folder of frames has no times: remove its start and end")
        return Pictures([os.path.join(path, name) for name in names], limits)
    return VideoFile(path, start, end, limits)


def frame_names(names: Sequence[str]) -> list[str]:
    """Return the names of images in natural order: 2.jpg comes before 10.jpg."""

    def key(name: str) -> list[str | int]:
        parts = re.split(r"(\d+)", PurePath(name).stem)
        return [int(part) if part.isdecimal() else part for part in parts]

    return sorted((n for n in names if n.lower().endswith(IMAGES) and not n.startswith(".")), key=key)


class Pictures:
    """Encoded images, as paths or bytes, that are the frames of one example.

    Raises:
      DecodeError: there are more of them than `Limits.frames`.
    """

    missing = repaired = 0

    def __init__(self, files: Sequence[str | bytes], limits: Limits = Limits()):  # noqa: B008 - immutable
        limits.check_frames(len(files))
        self._files, self.count, self._limits = files, len(files), limits

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        distinct = {
            int(index): _scaled(read_image(self._files[index], self._limits), short_side) for index in wanted
        }
        return stack([distinct[int(index)] for index in wanted])

    def close(self) -> None:
        """Do nothing: files are open only while they are read."""


class InMemoryFrames:
    """Frames in memory: uint8 [count, height, width, 3]; they are never scaled."""

    missing = repaired = 0

    def __init__(self, pictures: np.ndarray):
        self._pictures, self.count = pictures, len(pictures)

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        del short_side
        return self._pictures[list(wanted)]

    def close(self) -> None:
        """Do nothing."""


def _scaled(picture: np.ndarray, short_side: int) -> np.ndarray:
    """Return a picture, scaled down if its short side is longer than a `short_side` other than 0."""
    scale = short_side / min(picture.shape[:2]) if short_side else 1
    if scale >= 1:
        return picture
    height, width = (round(side * scale) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)


def without_extension(name: str) -> str:
    """Return a file name without its media extension, so that a clip has one name in any encoding."""
    stem, dot, extension = name.rpartition(".")
    return stem if f"{dot}{extension}".lower() in IMAGES + VIDEOS else name
