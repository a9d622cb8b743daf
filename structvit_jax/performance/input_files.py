"""Data sets to measure reading with: they repeat generated files, or files of the user."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from structvit_jax.data.folder import examples_below
from structvit_jax.data.image import IMAGES
from structvit_jax.utils.errors import UserError

_EXAMPLES = 4096  # length of the list of the training split, at least
_FRAMES, _HEIGHT, _WIDTH = 300, 256, 340  # of a generated video


def find(paths: Sequence[str], *, video: bool) -> list[str]:
    """Return the videos (or images) among some files, and those below folders.

    Raises:
      UserError: there is no such file or folder.
    """
    return [file for path in paths for file in _below(path, video)]


def _below(path: str, video: bool) -> Iterator[str]:
    if os.path.isdir(path):
        yield from (os.path.join(path, name) for name in examples_below(path, video))
    elif not os.path.isfile(path):
        raise UserError(f"{path} cannot be read: it is not a file or folder")
    elif path.lower().endswith(IMAGES) != video:
        yield path


def generate(folder: Path, *, video: bool, small: bool) -> str:
    """Write an example of generated data to a folder, unless it exists, and return its path.

    Args:
      folder: an existing folder.
      video: whether to write a video (see `write_video`) rather than an image.
      small: whether the image has 28x28 pixels rather than 500x375.
    """
    name = "video.mp4" if video else "small.png" if small else "image.jpg"
    path = folder / name
    if not path.exists():
        if video:
            write_video(str(path), key_interval=30)
        else:
            write_image(str(path), (28, 28) if small else (500, 375))
    return str(path)


def write_data_set(folder: Path, files: Sequence[str]) -> None:
    """Write a data set of two classes to a new folder: lists that repeat some files."""
    folder.mkdir()
    repeats = -(-_EXAMPLES // len(files))
    paths = [os.path.abspath(file) for file in files] * repeats
    rows = [json.dumps({"path": path, "label": str(number % 2)}) for number, path in enumerate(paths)]
    for split, part in (("train", rows), ("val", rows[:2])):
        (folder / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in part))


def write_video(path: str, key_interval: int = 250) -> None:
    """Write a video of a drifting texture with noise. Its bit rate is about 300 kbit/s.

    It has 300 frames of 340x256 pixels, encoded as h264 with a key frame every `key_interval` frames.
    """
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (64, 128), np.uint8), np.ones((8, 8), np.uint8))
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"g": str(key_interval)})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(_FRAMES):
            grey = texture[number // 2 :, number:][:_HEIGHT, :_WIDTH] // 2
            grey = grey + rng.integers(0, 14, grey.shape, np.uint8)
            picture = np.repeat(grey[..., None], 3, axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_image(path: str, size: tuple[int, int]) -> None:
    """Write an image of smooth coloured blocks, as JPEG of quality 90 or PNG.

    Args:
      path: a path that ends in .jpg or .png.
      size: width and height in pixels.
    """
    width, height = size
    blocks = np.random.default_rng(0).integers(0, 255, (-(-height // 8), -(-width // 8), 3), np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
