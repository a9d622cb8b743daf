"""Write the copy of one video that `structvit prepare --transcode` makes, and read what is recorded in it.

A copy is an H.264 video in MP4 that decodes fast: it is small, has a key frame every 12 frames, and 8 of 12
frames are not needed to decode others. Frame i of a copy is frame i of its original at the same time. A copy
is encoded from the frames that the reader makes of the original, so rotation and colours are preserved.

The last bytes of a copy are a `Record`, which is written when everything else is complete and verified.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from structvit_jax.data.limits import Limits
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.failures import DecodeError, parse_json

VERSION = 1  # of the format of copies; a copy in another format is replaced
LONGEST_INTERVAL = 16  # frames; a small video with key frames at least this often needs no copy
_INTERVAL = 12  # frames from one key frame to the next in copies
# Measured on real clips: CAVLC without deblocking ("fastdecode") halves the decoding time and costs 5 % more
# bytes; B-frames that nothing refers to can be skipped; slower presets gain 0.3 dB at equal size.
_ENCODER = {
    "preset": "veryfast",
    "tune": "fastdecode",
    "crf": "16",
    "g": str(_INTERVAL),
    "bf": "3",
    "x264-params": f"keyint={_INTERVAL}:min-keyint={_INTERVAL}:scenecut=0:b-adapt=0:b-pyramid=none",
}
# The reader uses BILINEAR alone, which makes pictures of even width about 1.5 grey levels too dark. It
# does so when it reads copies; they must not be too dark already.
_ACCURATE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_SAMPLED = 4  # frames of each copy whose quality is measured
_PERFECT = 100.0  # dB; PSNR of equal pictures
_BOX = b"uuid" + uuid.UUID("7d1a3d52-5d0c-4c1f-9a5e-2f1b8a6e4c07").bytes  # tag of the last box of a copy
_BOX_LIMIT = 1024  # bytes; no record is longer


class Record(NamedTuple):
    """What a copy stores about itself and its original."""

    original_bytes: int
    original_mtime: int  # nanoseconds
    short_side: int  # pixels; the requested one, which may be longer than that of the copy
    frames: int
    psnr: float  # dB, over sampled frames
    ssim: float
    same_times: bool  # whether `start` and `end` select the same frames as in the original, whatever they are
    version: int = VERSION

    def is_of(self, original: os.stat_result, short_side: int) -> bool:
        """Return whether this is the record of a copy that is up to date."""
        made_from = (self.original_bytes, self.original_mtime, self.short_side, self.version)
        return made_from == (original.st_size, original.st_mtime_ns, short_side, VERSION)


def read_record(path: str) -> Record | None:
    """Return the record of a copy, or None if the file is not a complete copy or does not exist."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(_BOX_LIMIT, file.seek(0, os.SEEK_END)), os.SEEK_END)
            tail = file.read()
        start = tail.rindex(_BOX) - 4
        if struct.unpack_from(">I", tail, start)[0] != len(tail) - start:
            return None
        return Record(**parse_json(tail[start + 4 + len(_BOX) :]))
    except (OSError, ValueError, TypeError, struct.error):
        return None


def write_copy(path: str, video: VideoFile, original: os.stat_result, short_side: int) -> Record:
    """Write the copy of a video to a new file, verify it, and wait until it is on the disk.

    Args:
      path: the file to write.
      video: the original.
      original: size and modification time of the original, from before it was opened.
      short_side: the short side of the copy in pixels; smaller videos keep their size.

    Raises:
      DecodeError: a frame of the original cannot be decoded, or the copy is not equivalent to it.
      OSError: the file cannot be written.
    """
    try:
        sampled = _encode(path, video, short_side)
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from error
        raise DecodeError(f"cannot be encoded: {error.strerror}") from error
    with contextlib.closing(VideoFile(path, limits=Limits(frames=video.count))) as copy:
        same_times = _check_times(video, copy)
        psnr, ssim = _quality(sampled.values(), copy.frames(list(sampled)))
    record = Record(
        original.st_size, original.st_mtime_ns, short_side, video.count, psnr, ssim, same_times=same_times
    )
    content = json.dumps(record._asdict()).encode()
    with open(path, "ab") as file:
        file.write(struct.pack(">I", 4 + len(_BOX) + len(content)) + _BOX + content)
        file.flush()
        os.fsync(file.fileno())
    return record


def same_part(
    video: VideoFile, copy: VideoFile, start: float | None, end: float | None
) -> tuple[float | None, float | None]:
    """Return start and end in seconds of the frames in a copy that are the given part of its original.

    They differ if the containers count times from different frames, or in different units: start and end are
    rounded to half a unit, and the unit of an AVI file is a frame.
    """
    part = video.select(start, end)
    if copy.select(start, end) == part:
        return start, end
    times = copy.times()
    times.append(times[-1] + 1)
    first, stop = (float(times[number] * copy.unit) for number in (part.start, part.stop))
    return None if start is None else first, None if end is None else stop


def _encode(path: str, video: VideoFile, short_side: int) -> dict[int, np.ndarray]:
    """Encode all frames of a video.

    Returns:
      Some of them by number, converted as the reader converts the original.
    """
    times = video.times()
    if np.any(np.diff(times) <= 0):
        raise DecodeError("two frames have the same time")
    wanted = set(np.linspace(0, len(times) - 1, _SAMPLED).round().astype(int).tolist())
    sampled: dict[int, np.ndarray] = {}
    # A copy counts in the same unit as its original, or in a whole fraction of it.
    base = Fraction(1, video.unit.denominator)
    options = {"video_track_timescale": str(base.denominator)}
    with av.open(f"file:{path}", "w", format="mp4", options=options) as container:
        scale, scale_as_reader, subsample = (VideoReformatter() for _ in range(3))
        for number, (time, original) in enumerate(zip(times, video.decode_all(), strict=True)):
            if number == 0:
                shape = original.width, original.height
                size = _scaled_size(*shape, short_side)
            if (original.width, original.height) != shape:
                raise DecodeError("its frames differ in size")
            picture = _upright(original, scale, size, _ACCURATE)
            if number == 0:
                stream = _add_stream(container, picture.shape, base, video)
            if number in wanted:
                sampled[number] = _upright(original, scale_as_reader, size, Interpolation.BILINEAR)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            # AREA: the reader spreads a chroma sample over 2x2 pixels, so it has to be their mean.
            frame = subsample.reformat(frame, format="yuv420p", interpolation=Interpolation.AREA, threads=1)
            frame.time_base, frame.pts = base, (time - times[0]) * video.unit.numerator
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return sampled


def _upright(
    frame: av.VideoFrame, scale: VideoReformatter, size: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """Return a frame scaled to (width, height) and then rotated, uint8 [height, width, 3], RGB."""
    picture = scale.reformat(
        frame, width=size[0], height=size[1], format="rgb24", interpolation=interpolation, threads=1
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90)) if frame.rotation else picture


def _scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return even sides with the given short side; never larger than they are, except to 2 pixels."""
    scale = min(1, short_side / min(width, height))
    sides = (min(round(side * scale / 2) * 2, side // 2 * 2) for side in (width, height))
    new_width, new_height = (max(side, 2) for side in sides)
    return new_width, new_height


def _add_stream(
    container: OutputContainer, shape: Sequence[int], base: Fraction, video: VideoFile
) -> VideoStream:
    """Add the video stream; `base` is the unit of its times in seconds."""
    # The rate only serves to distribute bits.
    rate = min(max(Fraction(video.count / (video.seconds or 1)), Fraction(1)), Fraction(1000))
    stream = container.add_stream("libx264", rate=rate.limit_denominator(1001), options=_ENCODER)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", base
    stream.codec_context.thread_count = 1
    return stream


def _check_times(video: VideoFile, copy: VideoFile) -> bool:
    """Check that a copy has the frames of its original at the same times.

    Returns:
      Whether both also count times from the same frame, and in the same unit.

    Raises:
      DecodeError: a frame is missing, or is at another time.
    """
    old, new = video.times(), copy.times()
    same = len(old) == len(new) and not copy.missing
    if not same or any(
        (a - old[0]) * video.unit != (b - new[0]) * copy.unit for a, b in zip(old, new, strict=True)
    ):
        raise DecodeError("an MP4 file cannot keep the times of its frames")
    return old[0] == new[0] and video.unit == copy.unit


def _quality(pictures: Iterable[np.ndarray], decoded: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return PSNR in dB and SSIM of decoded frames; both are taken over all of the pictures."""
    pairs = list(zip(pictures, decoded, strict=True))
    error = np.mean([np.square(a.astype(np.float32) - b).mean() for a, b in pairs])
    psnr = min(10 * np.log10(255**2 / error), _PERFECT) if error else _PERFECT
    return float(psnr), float(np.mean([_ssim(a, b) for a, b in pairs]))


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean structural similarity of the grey values of two pictures (Wang et al., 2004)."""

    def blur(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5)

    x, y = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) for picture in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())
