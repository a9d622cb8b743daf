"""Speed of reading examples on one core, stage by stage, and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from structvit_jax.config import default_config
from structvit_jax.data.index import Entry, Index
from structvit_jax.data.media import configure_decoding, open_media
from structvit_jax.data.pipeline import train_batches
from structvit_jax.data.reader import Reader
from structvit_jax.data.types import AugmentOptions, DataOptions
from structvit_jax.utils.errors import DecodeError, UserError

FRAMES, SIZE = 16, 224
_MIN_CLIPS = 16  # to see memory grow
_LENGTH, _HEIGHT, _WIDTH = 300, 256, 340


def write_video(path: str, key_interval: int = 250) -> None:
    """Write a video of a drifting texture, with noise for some 300 kbit/s."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (64, 128), np.uint8)
    texture = np.kron(blocks, np.ones((8, 8), np.uint8))
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"g": str(key_interval)})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(_LENGTH):
            grey = texture[number // 2 :, number:][:_HEIGHT, :_WIDTH] // 2
            grey = grey + rng.integers(0, 14, grey.shape, np.uint8)
            picture = np.repeat(grey[..., None], 3, axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_image(path: str) -> None:
    """Write a JPEG of 500x375 pixels."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (47, 63, 3), np.uint8)
    Image.fromarray(blocks).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def seconds_of(path: str) -> float:
    """Return the duration of a video."""
    with av.open(path) as container:
        return (container.duration or 1) / av.time_base


def make_reader(path: str, frames: int, randaugment: str) -> Reader:
    """Return a reader of 1000 copies of one file, augmented as in the recipes of the paper."""
    count = open_media(path).count
    config = default_config()
    data = dataclasses.replace(
        DataOptions.from_config(config.data),
        frames=frames,
        size=SIZE,
        channels="rgb",
        stride=max(count // 5 // max(frames, 1), 1),
        mean=(0.45,) * 3,
        workers=2,
    )
    augment = dataclasses.replace(
        AugmentOptions.from_config(config.augment),
        randaugment=randaugment,
        flip=0.5,
        crop_area=(0.08, 1.0),
        crop_aspect=(3 / 4, 4 / 3),
    )
    return Reader(Index("", [Entry(os.path.abspath(path), "0")] * 1000, ("0",)), data, augment, seed=0)


def time_stages(reader: Reader, examples: int) -> dict[str, list[float]]:
    """Return the seconds of opening, decoding and augmenting, by example."""
    stages: dict[str, list[float]] = {"open and index": [], "decode": [], "augment and crop": []}
    for number in range(examples):
        times = [time.perf_counter()]
        media, _ = reader.source.open(number)
        times.append(time.perf_counter())
        picked = reader.frames(media.count, reader.generator(1, 0, number))
        (clip,) = reader.decode(media, [picked])
        times.append(time.perf_counter())
        reader.transform(clip, reader.generator(2, 0, number, 0))
        times.append(time.perf_counter())
        for name, begin, end in zip(stages, times, times[1:], strict=False):
            stages[name].append(end - begin)
    return stages


def plain_loop(path: str, reader: Reader, number: int) -> np.ndarray:
    """Decode and convert every frame, then select, as users do."""
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picked = reader.frames(len(pictures), reader.generator(1, 0, number))
    return np.stack([pictures[index] for index in picked])


def compare_decoding(path: str, clips: int) -> tuple[float, float]:
    """Return the median seconds per clip of `Reader` and of the plain loop, in alternation.

    Raises:
      RuntimeError: their frames differ in a bit.
    """
    reader = make_reader(path, FRAMES, "")
    reader_seconds, plain_seconds = [], []
    for number in range(clips):
        begin = time.perf_counter()
        media, _ = reader.source.open(number)
        (clip,) = reader.decode(media, [reader.frames(media.count, reader.generator(1, 0, number))])
        middle = time.perf_counter()
        other = plain_loop(path, reader, number)
        reader_seconds.append(middle - begin)
        plain_seconds.append(time.perf_counter() - middle)
        if not np.array_equal(clip, other):
            raise RuntimeError(f"clip {number} of {path} differs from the plain loop's")
    return statistics.median(reader_seconds), statistics.median(plain_seconds)


def report_stages(name: str, stages: dict[str, list[float]]) -> None:
    """Print the medians of `time_stages`."""
    medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
    total = statistics.median(map(sum, zip(*stages.values(), strict=True)))
    parts = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in medians.items())
    print(f"{name}: {1 / total:.1f} per second on one core ({parts})", flush=True)


def resident_mb() -> float:
    """Return the resident memory of this process and its children in MB; shared pages count in each."""
    pages = 0
    for pid in [os.getpid(), *_children(os.getpid())]:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _children(parent: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            stat = Path(f"/proc/{int(entry)}/stat").read_text()
            if int(stat.rsplit(")", 1)[1].split()[1]) == parent:
                found += [int(entry), *_children(int(entry))]
    return found


def report_memory(path: str, clips: int) -> None:
    """Read clips with two workers and print the growth of memory over the last three quarters."""
    reader, batch = make_reader(path, FRAMES, "rand-m7-n4-mstd0.5-inc1"), 4
    marks: dict[int, float] = {}
    stream = train_batches(reader, batch, start_step=0)
    with contextlib.closing(stream):
        for step in range(1, clips // batch + 1):
            next(stream)
            if step * batch in (clips // 4, clips // 2, 3 * clips // 4, clips):
                marks[step * batch] = resident_mb()
                print(f"resident memory after {step * batch} clips: {marks[step * batch]:.0f} MB", flush=True)
    growth = marks[max(marks)] - marks[min(marks)]
    print(f"growth from clip {min(marks)} to clip {max(marks)}: {growth:+.1f} MB", flush=True)


def run(video: str, image: str, clips: int, memory: int) -> None:
    """Print all measurements of `structvit bench input`.

    Raises:
      UserError: a file that cannot be read, or too few clips to see memory grow.
    """
    if memory and memory < _MIN_CLIPS:
        raise UserError(f"--memory={memory}: it takes 0 or at least {_MIN_CLIPS} clips")
    configure_decoding()
    try:
        measure(video, image, clips, memory)
    except DecodeError as error:
        raise UserError(f"{' or '.join(filter(None, (video, image)))} cannot be read: {error}") from error


def measure(video: str, image: str, clips: int, memory: int) -> None:
    """Print all measurements, of the given files or of generated ones.

    Raises:
      DecodeError: a file cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        videos = [video]
        if not video:
            videos = [os.path.join(folder, f"key_frame_every_{interval}.mp4") for interval in (30, 60, 250)]
            for path, interval in zip(videos, (30, 60, 250), strict=True):
                write_video(path, interval)
        for path in videos:
            seconds, plain = compare_decoding(path, clips)
            rate = 8e-3 * os.path.getsize(path) / seconds_of(path)
            print(
                f"{os.path.basename(path)}, {rate:.0f} kbit/s: decoding {1000 * seconds:.1f} ms per clip,"
                f" plain loop {1000 * plain:.1f} ms ({plain / seconds:.1f} times)",
                flush=True,
            )
        reader = make_reader(videos[-1], FRAMES, "rand-m7-n4-mstd0.5-inc1")
        report_stages("clips", time_stages(reader, clips))
        picture = image or os.path.join(folder, "image.jpg")
        if not image:
            write_image(picture)
        report_stages("images", time_stages(make_reader(picture, 0, "rand-m9-mstd0.5-inc1"), 5 * clips))
        if memory:
            report_memory(videos[-1], memory)
