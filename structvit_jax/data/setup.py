"""Process-wide settings of the decoding libraries."""

from __future__ import annotations

import functools
import warnings

import cv2
from PIL import Image


@functools.cache
def configure_decoding() -> None:
    """Decode on one thread per process, and let `Limits.pixels` replace Pillow's warning about large images.

    Entry points and data workers call this once; decoded pixels do not depend on it.
    """
    cv2.setNumThreads(1)  # workers are the parallelism
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
