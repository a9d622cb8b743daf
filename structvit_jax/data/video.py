"""Chosen frames of a video file: demultiplexed in full, decoded only where needed.

Frame i is the i-th picture by presentation time. The container's announced frame count is never used: it is
wrong or missing in webm, mkv and damaged files.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from structvit_jax.errors import DecodeError, decoding

_SKIPPING = ("h264", "hevc", "mpeg4", "vp8", "vp9")  # decoders that may leave out single pictures
_UNINDEXED = ("avi", "mpegts")  # containers whose times are only right when read from the beginning


class VideoFile:
    """A video, or the part of it from `start` to `end` seconds.

    Attributes:
      count: frames to sample from. Of a file that was cut off it includes those that are missing, so that
        sampling does not drift; asking for one of them is an error.
      missing: how many of these are missing.

    Raises:
      DecodeError: no video in it, or nothing that can be read.
    """

    def __init__(self, file: str | bytes, start: float | None = None, end: float | None = None):
        self._container = _open(file)
        self._stream = self._container.streams.video[0]
        try:
            with decoding():
                index = _demux(self._container, self._stream, start, end)
        except DecodeError:
            self.close()
            raise
        first, stop = (int(np.searchsorted(index.times, bound)) for bound in (index.start, index.end))
        self._times, self._keys = index.times[first:stop], index.keys
        self.count = stop - first
        self.missing = max(stop - max(first, index.present), 0)
        if self.count < 1:
            self.close()
            part = "" if start is None and end is None else f" from {start or 0} s to {end or 'the end'} s"
            raise DecodeError("no video frames" + part)

    def close(self) -> None:
        """Frees the file and the decoder; waiting for garbage collection would hold many of them."""
        self._container.close()

    @property
    def seconds(self) -> float:
        """From the first frame to the last, and as much longer as frames are apart in the mean."""
        span = float((self._times[-1] - self._times[0]) * self._stream.time_base)
        return span * self.count / max(self.count - 1, 1)

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        """uint8 [len(wanted), height, width, 3], upright, RGB.

        Args:
          wanted: frame numbers below `count`, in any order, repeated as may be.
          short_side: pictures whose short side is longer are scaled to this while converting; 0 never.

        Raises:
          DecodeError: one of them is missing or damaged.
        """
        check_there(wanted, self.count, self.missing)
        times = [self._times[index] for index in wanted]
        pictures: dict[Any, np.ndarray] = {}
        convert = VideoReformatter()  # one for all frames: setting it up costs more than using it
        with decoding():
            for key, group in self._groups(set(times)):
                for frame in _decode(self._container, self._stream, key, group):
                    pictures[frame.pts] = _picture(frame, convert, short_side)
        if lost := set(times) - pictures.keys():
            raise DecodeError(f"frame {self._times.index(min(lost))} of {self.count} cannot be decoded")
        return stack([pictures[time] for time in times])

    def cut(self) -> tuple[bytes, int]:
        """A Matroska file of these frames alone, copied without decoding, and how many come before the first
        of them: decoding begins at a key frame.

        Raises:
          DecodeError: there is no key frame to begin at.
        """
        check_there([0], self.count, self.missing)
        wanted = set(self._times[: self.count - self.missing])
        (key, _), *_ = self._groups({min(wanted)})
        target, before = io.BytesIO(), 0
        with decoding(), av.open(target, "w", format="matroska") as out:
            copy = out.add_stream_from_template(self._stream)
            for packet in _packets_from(self._container, self._stream, key):
                pts = _stamps(packet)[0]
                if not wanted or not packet.size:
                    break
                before += pts < self._times[0]
                wanted.discard(pts)
                packet.stream = copy
                out.mux(packet)
        return target.getvalue(), before

    def _groups(self, times: set[int]) -> Iterator[tuple[_Packet, set[int]]]:
        """The wanted times after each key frame."""
        if not self._keys or self._keys[0].pts > min(times):
            raise DecodeError("no key frame to start decoding from")
        starts = [key.pts for key in self._keys]
        place = {time: int(np.searchsorted(starts, time, side="right")) - 1 for time in times}
        for number in sorted(set(place.values())):
            yield self._keys[number], {time for time in times if place[time] == number}


def check_there(wanted: Sequence[int], count: int, missing: int) -> None:
    """Raises DecodeError if one of the wanted frames is among the last, missing ones."""
    if max(wanted) >= count - missing:
        raise DecodeError(f"cut off: {missing} of {count} frames are missing, frame {max(wanted)} among them")


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The frames of a clip as one array; raises DecodeError if they differ in size."""
    if len({picture.shape for picture in pictures}) > 1:
        raise DecodeError("its frames differ in size")
    return np.stack(pictures)


class _Packet(NamedTuple):
    pts: int
    dts: int


class _Index(NamedTuple):
    """What a file holds, in its stream's unit of time."""

    times: list[int]  # of all pictures, in order; where the file was cut off, with those it should have
    present: int  # so many of them it has
    keys: list[_Packet]  # pictures that decoding can start from
    start: float  # of the part asked for
    end: float


def _open(file: str | bytes) -> Any:
    """The file, opened. Its video is decoded by one thread: workers are the parallelism."""
    with decoding():
        if isinstance(file, str) and os.path.isdir(file):
            raise DecodeError("a folder without pictures, not a video file")
        if not (len(file) if isinstance(file, bytes) else os.stat(file).st_size):
            raise DecodeError("empty file")
        container = av.open(io.BytesIO(file) if isinstance(file, bytes) else file, metadata_errors="replace")
    if problem := _unsupported(container):
        container.close()
        raise DecodeError(problem)
    container.streams.video[0].codec_context.thread_count = 1
    return container


def _unsupported(container) -> str | None:
    video = container.streams.video
    if not video:
        return "no video stream"
    if (codec := video[0].codec_context) is None:
        return "no decoder for its video"
    kind = container.format.name
    if kind == "mpeg" or (kind == "avi" and codec.name in ("h264", "hevc") and codec.has_b_frames):
        return f"{codec.name} in {kind} does not keep the times of its frames; convert it to mp4 or mkv"
    return None


def _demux(container, stream, start: float | None, end: float | None) -> _Index:
    """Reads all packets of the part asked for."""
    base, origin = float(stream.time_base), stream.start_time or 0
    # Half a unit of tolerance: seconds written with rounding still name the frame they mean.
    first = -np.inf if start is None else origin + start / base - 0.5
    stop = np.inf if end is None else origin + end / base - 0.5
    if start and container.format.name not in _UNINDEXED:
        container.seek(int(first), stream=stream)
    # Where the stream does not say how long it is, the container does, for all streams together.
    streams = [stream] if stream.duration else [s for s in container.streams if s.type in ("video", "audio")]
    number, hides = stream.index, stream.codec_context.name == "vp8"
    bases = {s.index: float(s.time_base) for s in streams}
    times: list[int] = []
    keys: list[_Packet] = []
    last = ended = 0.0
    with contextlib.suppress(av.FFmpegError):  # cut off in the middle of a packet
        for packet in container.demux(*streams):
            pts, dts = _stamps(packet)
            if pts is None:
                continue
            last = max(last, pts * bases[packet.stream_index])
            ended = max(ended, (pts + (packet.duration or 0)) * bases[packet.stream_index])
            if packet.stream_index != number or not _shown(packet, hides):
                continue
            if dts >= stop and container.format.name not in _UNINDEXED:
                return _Index(sorted(times), len(times), sorted(keys), first, stop)
            times.append(pts)
            if packet.is_keyframe:
                keys.append(_Packet(pts, dts))
    times = sorted(times)
    if times and container.format.name == "avi":  # counts from the first packet decoded, not shown
        first, stop = first + times[0] - origin, stop + times[0] - origin
    lost = _lost(container, stream, times, last, ended)
    return _Index(times + lost, len(times), sorted(keys), first, stop)


def _lost(container, stream, times: list[int], last: float, ended: float) -> list[int]:
    """Where pictures should be after the last packet of any stream, if that comes more than two frames
    before the announced end. `last` and `ended` are its time and that plus its duration, in seconds."""
    if not times:
        return []
    if stream.duration:
        announced = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    else:
        announced = (container.duration or 0) / av.time_base
    base = float(stream.time_base)
    gaps = np.diff(times) if len(times) > 1 else [1 / (base * float(stream.average_rate or 25))]
    usual, mean = float(np.median(gaps)), float(np.mean(gaps))
    spacing = base * max(usual, mean)  # rates vary, and a last picture may be shown for long
    if announced - last <= 2 * spacing or announced - ended <= spacing:
        return []
    count = round((announced / base - times[-1]) / max(usual, 1)) - 1
    return [times[-1] + round(usual * (number + 1)) for number in range(count)]


def _stamps(packet) -> tuple[Any, Any]:
    """Presentation and decoding time; some containers write only one of them."""
    return (
        packet.dts if packet.pts is None else packet.pts,
        packet.pts if packet.dts is None else packet.dts,
    )


def _shown(packet, hides: bool) -> bool:
    """Whether a packet is a picture to show; VP8 hides some, in packets of their own, to predict from."""
    if packet.is_discard or not packet.size:
        return False
    return not hides or bool(bytes(packet)[0] >> 4 & 1)


def _decode(container, stream, key: _Packet, wanted: set[int]) -> Iterator[av.VideoFrame]:
    """The wanted frames after a key frame; others are decoded only where frames are predicted from them."""
    codec, ahead = stream.codec_context, set(wanted)
    for packet in _packets_from(container, stream, key):
        pts = _stamps(packet)[0]
        if codec.name in _SKIPPING:
            codec.skip_frame = "DEFAULT" if pts is None or pts in wanted else "NONREF"
        yield from (frame for frame in packet.decode() if frame.pts in wanted)
        ahead.discard(pts)
        if not ahead:  # all have been given to the decoder, which may hold some back for reordering
            break
    if not ahead:
        yield from (frame for frame in codec.decode(None) if frame.pts in wanted)


def _packets_from(container, stream, key: _Packet) -> Iterator[Any]:
    """The packets from a key frame on. Some containers seek by one clock, some by the other."""
    for target in key:
        container.seek(target, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if first.size and _stamps(first)[1] <= key.dts:
            break
    for packet in itertools.chain([first], packets):
        if not packet.size or _stamps(packet)[1] >= key.dts:
            yield packet


def _picture(frame: av.VideoFrame, convert: VideoReformatter, short_side: int) -> np.ndarray:
    scale = short_side / min(frame.width, frame.height) if short_side else 1
    size = {"width": round(frame.width * scale), "height": round(frame.height * scale)} if scale < 1 else {}
    picture = convert.reformat(
        frame, format="rgb24", interpolation="BILINEAR", threads=1, **size
    ).to_ndarray()
    return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture
