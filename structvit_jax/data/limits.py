"""Limits on media files, checked before memory is allocated."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from structvit_jax.data.types import DataOptions
from structvit_jax.utils.failures import DecodeError


class Limits(NamedTuple):
    """Limits on one example: config.data.max_pixels, max_frames and max_replaced_frames."""

    pixels: int = 2**26  # width x height of a picture
    frames: int = 2**20  # number of frames of a video file or of a folder of frames
    bad_frames: float = 0.0  # fraction of the frames of a clip that may be replaced by their neighbours

    @classmethod
    def of(cls, data: DataOptions) -> Limits:
        """Return the limits that a configuration sets."""
        return cls(data.max_pixels, data.max_frames, data.max_replaced_frames)

    def check_picture(self, width: int, height: int) -> None:
        """Raise a DecodeError if a picture has too many pixels."""
        if width * height > self.pixels:
            raise DecodeError(
                f"{width} x {height} pixels, more than --config.data.max_pixels={self.pixels} allows"
            )

    def check_frames(self, count: int) -> None:
        """Raise a DecodeError if a file has, or announces, too many frames."""
        if count > self.frames:
            raise DecodeError(f"{count} frames, more than --config.data.max_frames={self.frames} allows")


def file_size(path: str) -> int:
    """Return the size of a regular file in bytes.

    Raises:
      DecodeError: the file does not exist, is empty, or is not a regular file: pipes and devices may never
        end.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DecodeError(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError("not a regular file")
    if not status.st_size:
        raise DecodeError("empty file")
    return status.st_size
