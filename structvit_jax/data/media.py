"""Open the frames of an example: a video, a folder of frames, an image, or an array."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import PurePath

import av.logging
import cv2
import numpy as np
from PIL import Image

from structvit_jax.data.container import VIDEOS
from structvit_jax.data.image import IMAGES, read_image
from structvit_jax.data.limits import Limits
from structvit_jax.data.types import Media
from structvit_jax.data.video import VideoFile, stack
from structvit_jax.utils.failures import DecodeError


@functools.cache
def configure_decoding() -> None:
    """Set OpenCV to one thread, and replace Pillow's limit on the size of images by `Limits.pixels`.

    Also make FFmpeg count errors, for `Media.damaged`. Entry points and data workers call this once.
    Decoded pixels do not depend on it.
    """
    cv2.setNumThreads(1)  # data workers run in parallel
    Image.MAX_IMAGE_PIXELS = None
    av.logging.set_level(av.logging.PANIC)  # the lowest level prints nothing, but errors are counted


def open_media(
    path: str,
    start: float | None = None,
    end: float | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Media:
    """Open an image, a folder of frames, or a video: all of it, or the part from `start` to `end` seconds.

    Raises:
      DecodeError: the path cannot be read, or exceeds the limits.
    """
    if path.lower().endswith(IMAGES):
        return Pictures([path], limits)
    if os.path.isdir(path) and (names := frame_names(os.listdir(path))):
        if start is not None or end is not None:
            raise DecodeError("a folder of frames has no times: remove its start and end")
        return Pictures([os.path.join(path, name) for name in names], limits)
    return VideoFile(path, start, end, limits)


def frame_names(names: Sequence[str]) -> list[str]:
    """Return the names of visible images, sorted in natural order: 2.jpg before 10.jpg."""

    def key(name: str) -> list[str | int]:
        parts = re.split(r"(\d+)", PurePath(name).stem)
        return [int(part) if part.isdecimal() else part for part in parts]

    return sorted((n for n in names if n.lower().endswith(IMAGES) and not n.startswith(".")), key=key)


def without_extension(name: str) -> str:
    """Strip a media extension, so that the name of a clip does not depend on its encoding."""
    stem, dot, extension = name.rpartition(".")
    return stem if f"{dot}{extension}".lower() in IMAGES + VIDEOS else name


class Pictures(Media):
    """Encoded images, as paths or bytes, one per frame.

    Raises:
      DecodeError: there are more images than `Limits.frames`.
    """

    def __init__(self, files: Sequence[str | bytes], limits: Limits = Limits()):  # noqa: B008 - immutable
        limits.check_frames(len(files))
        self._files, self.count, self._limits = files, len(files), limits

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        pictures = {index: read_image(self._files[index], self._limits, short_side) for index in set(wanted)}
        return stack([pictures[index] for index in wanted])


class FrameRange(Media):
    """`count` frames of other media, starting at frame `first`. The last `missing` of them do not exist."""

    def __init__(self, media: Media, first: int, count: int, missing: int):
        self._media, self._first, self.count, self.missing = media, first, count, missing

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        self.check_available(wanted)
        frames = self._media.frames([self._first + index for index in wanted], short_side)
        self.repaired, self.damaged = self._media.repaired, self._media.damaged
        return frames

    def close(self) -> None:
        self._media.close()


class InMemoryFrames(Media):
    """Frames in an array, uint8 [count, height, width, 3]. They are never scaled: `short_side` is ignored."""

    def __init__(self, pictures: np.ndarray):
        self._pictures, self.count = pictures, len(pictures)

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        return self._pictures[list(wanted)]


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """Convert grey from 0 to 1, [...], to uint8 [..., 3]."""
    pixels = np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)
