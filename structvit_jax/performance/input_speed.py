"""Time reading clips and images on one core, stage by stage: `structvit bench input`."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from typing import Any

import av
import numpy as np
from PIL import Image

from structvit_jax.config import default_config
from structvit_jax.data.index import Entry, Index
from structvit_jax.data.media import configure_decoding, open_media
from structvit_jax.data.reader import Reader
from structvit_jax.data.types import AugmentOptions, DataOptions
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

_FRAMES, _SIZE = 16, 224  # of the clips that are read
_LENGTH, _HEIGHT, _WIDTH = 300, 256, 340  # frames and pixels of generated videos
_KEY_INTERVALS = (30, 60, 250)  # frames between key frames of generated videos


def write_video(path: str, key_interval: int = 250) -> None:
    """Write a video of a drifting texture with noise. Its bit rate is about 300 kbit/s."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (64, 128), np.uint8), np.ones((8, 8), np.uint8))
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"g": str(key_interval)})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(_LENGTH):
            grey = texture[number // 2 :, number:][:_HEIGHT, :_WIDTH] // 2
            grey = grey + rng.integers(0, 14, grey.shape, np.uint8)
            picture = np.repeat(grey[..., None], 3, axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_image(path: str) -> None:
    """Write a JPEG of 500x375 pixels."""
    blocks = np.random.default_rng(0).integers(0, 255, (47, 63, 3), np.uint8)
    Image.fromarray(blocks).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def _make_reader(path: str, frames: int, randaugment: str = "") -> Reader:
    """Return a reader for a data set that lists one file 1000 times, with the augmentation of the paper.

    A clip has `frames` frames, spread over a fifth of the video.
    """
    config = default_config()
    data = dataclasses.replace(
        DataOptions.from_config(config.data),
        frames=frames,
        size=_SIZE,
        channels="rgb",
        stride=max(open_media(path).count // 5 // max(frames, 1), 1),
        mean=(0.45,) * 3,
    )
    augment = dataclasses.replace(
        AugmentOptions.from_config(config.augment),
        randaugment=randaugment,
        flip=0.5,
        crop_area=(0.08, 1.0),
        crop_aspect=(3 / 4, 4 / 3),
    )
    return Reader(Index("", [Entry(os.path.abspath(path), "0")] * 1000, ("0",)), data, augment, seed=0)


def _report_stages(name: str, reader: Reader, examples: int) -> None:
    """Time opening, decoding and augmenting, and print the median of each stage."""
    stages: dict[str, list[float]] = {"open and index": [], "decode": [], "augment and crop": []}
    for number in range(examples):
        times = [time.perf_counter()]
        media, _ = reader.source.open(number)
        times.append(time.perf_counter())
        picked = reader.frames(media.count, reader.generator(1, 0, number))
        (clip,) = reader.decode(media, [picked])
        times.append(time.perf_counter())
        reader.transform(clip, reader.draw(clip.shape[1:3], reader.generator(2, 0, number, 0)))
        times.append(time.perf_counter())
        for seconds, begin, end in zip(stages.values(), times, times[1:], strict=False):
            seconds.append(end - begin)
    total = statistics.median(map(sum, zip(*stages.values(), strict=True)))
    parts = ", ".join(
        f"{stage} {1000 * statistics.median(seconds):.1f} ms" for stage, seconds in stages.items()
    )
    print(f"{name}: {1 / total:.1f} per second on one core ({parts})", flush=True)


def _decode_all(path: str, reader: Reader, number: int) -> np.ndarray:
    """Decode and convert every frame of a video with PyAV, then select those of a clip (the plain loop)."""
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picked = reader.frames(len(pictures), reader.generator(1, 0, number))
    return np.stack([pictures[index] for index in picked])


def compare_decoding(path: str, clips: int) -> tuple[float, float]:
    """Time `Reader` and the plain loop alternately, and return their median seconds per clip.

    Raises:
      RuntimeError: the two decode different frames.
    """
    reader = _make_reader(path, _FRAMES)
    reader_seconds, plain_seconds = [], []
    for number in range(clips):
        begin = time.perf_counter()
        media, _ = reader.source.open(number)
        (clip,) = reader.decode(media, [reader.frames(media.count, reader.generator(1, 0, number))])
        middle = time.perf_counter()
        other = _decode_all(path, reader, number)
        reader_seconds.append(middle - begin)
        plain_seconds.append(time.perf_counter() - middle)
        if not np.array_equal(clip, other):
            raise RuntimeError(f"clip {number} of {path} differs between Reader and the plain loop")
    return statistics.median(reader_seconds), statistics.median(plain_seconds)


def _report_decoding(path: str, clips: int) -> None:
    seconds, plain = compare_decoding(path, clips)
    with av.open(path) as container:
        duration = (container.duration or 1) / av.time_base
    print(
        f"{os.path.basename(path)}, {8e-3 * os.path.getsize(path) / duration:.0f} kbit/s:"
        f" decoding {1000 * seconds:.1f} ms per clip,"
        f" plain loop {1000 * plain:.1f} ms ({plain / seconds:.1f} times)",
        flush=True,
    )


def run(video: str, image: str, clips: int) -> None:
    """Print the speed of reading a video and an image.

    Args:
      video: path of a video; "" generates three videos.
      image: path of an image; "" generates one.
      clips: number of clips to read for each result; images are read five times as often.

    Raises:
      UserError: a file cannot be read.
    """
    configure_decoding()
    with tempfile.TemporaryDirectory() as folder:
        videos, picture = [video], image or os.path.join(folder, "image.jpg")
        if not video:
            names = {f"key_frame_every_{interval}.mp4": interval for interval in _KEY_INTERVALS}
            videos = [os.path.join(folder, name) for name in names]
            for path, interval in zip(videos, names.values(), strict=True):
                write_video(path, interval)
        if not image:
            _write_image(picture)
        try:
            for path in videos:
                _report_decoding(path, clips)
            reader = _make_reader(videos[-1], _FRAMES, "rand-m7-n4-mstd0.5-inc1")
            _report_stages("clips", reader, clips)
            _report_stages("images", _make_reader(picture, 0, "rand-m9-mstd0.5-inc1"), 5 * clips)
        except DecodeError as error:
            raise UserError(f"{' or '.join(filter(None, (video, image)))} cannot be read: {error}") from error
