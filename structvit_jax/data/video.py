"""Read chosen frames of a video file: demultiplex the whole file, but decode only the frames that are needed.

Frame i is the i-th picture by presentation time. The frame count that the container announces is never used:
it is wrong or missing in webm, mkv and damaged files.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.logging
import numpy as np
from av.packet import Packet
from av.stream import Stream
from av.video.reformatter import VideoReformatter

from structvit_jax.data.container import open_container
from structvit_jax.data.limits import Limits
from structvit_jax.data.stages import stage
from structvit_jax.data.types import Media
from structvit_jax.utils.failures import DecodeError, decoding

_SKIPPING = ("h264", "hevc", "mpeg4", "vp8", "vp9")  # decoders that can skip single pictures
_UNINDEXED = ("avi", "mpegts")  # containers whose times are right only when read from the beginning
# Mark of MPEG-4 encoders (DivX, XviD) that store a B-frame in the packet of another frame.
_PACKED = re.compile(rb"\x00\x00\x01\xb2DivX\d+(?:Build|b)\d+p")
_MAX_SEEK = 2**62  # fits FFmpeg's int64
# Numbers of frames on either side to search for a replacement of a damaged frame, tried in this order.
_REACHES = (1, 4, 16, 64)


class VideoFile(Media):
    """A video, or the part of it from `start` to `end` seconds.

    In a truncated file, `count` includes the missing frames, so that sampling chooses the same frames as in
    the complete file. Reading a missing frame raises a DecodeError.

    Attributes:
      seconds: duration from the first frame to the last, plus the mean time between frames.
      size: width and height in pixels before rotation, as the file states them; 0 if it does not.
      unit: unit of `times`, in seconds.

    Raises:
      DecodeError: there is no video, the container is unsupported or damaged, or a limit is exceeded.
    """

    def __init__(
        self,
        file: str | bytes,
        start: float | None = None,
        end: float | None = None,
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ):
        self._limits, self._is_packed = limits, False
        self._container = open_container(file, limits)
        self._stream = self._container.streams.video[0]
        try:
            with decoding():
                times, self.missing, self._keys = self._demux(start, end)
                if not times:
                    part = f" from {start or 0} s to {'the end' if end is None else f'{end} s'}"
                    raise DecodeError("no video frames" + part * (start is not None or end is not None))
        except DecodeError:
            self.close()
            raise
        self.count = len(times)
        self._times = times[: self.count - self.missing]
        codec = self._stream.codec_context
        self.size, self.unit = (codec.width, codec.height), _time_base(self._stream)
        span = float((times[-1] - times[0]) * self.unit)
        self.seconds = span * self.count / max(self.count - 1, 1)

    def close(self) -> None:
        """Release the file and the decoder at once, so that few are open at the same time."""
        self._container.close()

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        """Return frames by number, rotated as the container states; see `Media.frames`.

        Raises:
          DecodeError: a frame is missing, or more frames are damaged than `Limits.bad_frames` allows.
        """
        self.check_available(wanted)
        self.damaged, errors = False, _logged_errors()
        times = [self._times[index] for index in wanted]
        pictures = self._decoded(set(times), short_side)
        lost = sorted(set(times) - pictures.keys())
        if len(lost) > self._limits.bad_frames * len(set(times)):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            number = self._times.index(lost[0])
            raise DecodeError(f"frame {number}{more} of {self.count} frames cannot be decoded")
        pictures |= {time: self._neighbour(time, short_side) for time in lost}
        self.repaired = len(lost)
        self.damaged |= bool(lost) or _logged_errors() > errors
        return stack([pictures[time] for time in times])

    def times(self) -> list[int]:
        """Return the times of the frames that exist, ascending, from where `start` and `end` count."""
        return [time - self._origin for time in self._times]

    def select(self, start: float | None, end: float | None) -> range:
        """Return the numbers of the frames from `start` to `end` seconds, without the missing frames."""
        lower, upper = self._bounds(start, end)
        return range(bisect.bisect_left(self._times, lower), bisect.bisect_left(self._times, upper))

    def key_interval(self) -> int:
        """Return the largest number of frames from a key frame to the last one before the next."""
        starts = [bisect.bisect_left(self._times, key.pts) for key in self._keys]
        return int(np.diff([0, *starts, len(self._times)]).max())

    def decode_all(self) -> Iterator[av.VideoFrame]:
        """Yield all frames in display order, neither converted to RGB nor rotated.

        Raises:
          DecodeError: a frame is missing or cannot be decoded.
        """
        self.check_available([self.count - 1])
        if not self._keys or self._keys[0].pts > self._times[0]:
            raise DecodeError("no key frame to start decoding from")
        seen: set[int | None] = set()
        with decoding():
            for frame in self._decode(self._keys[0], set(self._times)):
                if frame.pts not in seen:
                    seen.add(frame.pts)
                    yield frame
        if lost := [time for time in self._times if time not in seen]:
            raise DecodeError(f"frame {self._times.index(lost[0])} of {self.count} frames cannot be decoded")

    def cut(self) -> tuple[bytes, int]:
        """Copy the frames of this video, or of this part of one, into a Matroska file without decoding them.

        The file has to start with a key frame, so it may start with frames from before the part.

        Returns:
          The file, and the number of frames in it before the first frame of the part.

        Raises:
          DecodeError: there is no key frame to start at.
        """
        self.check_available([0])
        wanted = set(self._times)
        (key, _), *_ = self._groups({min(wanted)})
        target, before = io.BytesIO(), 0
        with decoding(), av.open(target, "w", format="matroska") as out:
            copy = out.add_stream_from_template(self._stream)
            for packet in self._packets_from(key):
                pts = _pts_dts(packet)[0]
                if not wanted or not packet.size:
                    break
                before += pts < self._times[0]
                wanted.discard(pts)
                packet.stream = copy
                out.mux(packet)
        return target.getvalue(), before

    def _demux(self, start: float | None, end: float | None) -> tuple[list[int], int, list[_Packet]]:
        """Read all packets of the requested part.

        Returns:
          The times of its pictures, ascending, in units of the stream's time base. If the file is truncated,
          the last ones are the estimated times of missing pictures.
          The number of missing pictures.
          The key frames, from which decoding can start, whether they are shown or not.
        """
        container, stream = self._container, self._stream
        self._origin = stream.start_time or 0
        lower, upper = self._bounds(start, end)
        is_indexed = container.format.name not in _UNINDEXED
        if start and is_indexed:
            container.seek(int(min(max(lower, -_MAX_SEEK), _MAX_SEEK)), stream=stream)
        # If the video stream does not state its duration, `_lost` uses that of the container, which covers
        # all streams; so read the audio streams too.
        streams = [s for s in container.streams if s.type in ("video", "audio")]
        streams = [stream] if stream.duration else streams
        bases = {s.index: float(_time_base(s)) for s in streams}
        times: list[int] = []
        keys: list[_Packet] = []
        last = ended = 0.0
        is_vp8 = stream.codec_context.name == "vp8"
        stopped = False  # whether reading stopped at the requested end
        with contextlib.suppress(av.FFmpegError):  # the file is truncated in the middle of a packet
            for packet in container.demux(*streams):
                pts, dts = _pts_dts(packet)
                if pts is None:
                    continue
                index = packet.stream_index
                last = max(last, pts * bases[index])
                ended = max(ended, (pts + (packet.duration or 0)) * bases[index])
                if index != stream.index or not packet.size:
                    continue
                if stopped := dts >= upper and is_indexed:
                    break
                if not times and stream.codec_context.name == "mpeg4":
                    head = (stream.codec_context.extradata or b"") + bytes(packet)
                    self._is_packed = bool(_PACKED.search(head))
                if packet.is_keyframe:  # even if an edit list hides it
                    keys.append(_Packet(pts, dts))
                if not packet.is_discard and not (is_vp8 and _is_hidden(packet)):
                    times.append(pts)
                    self._limits.check_frames(len(times))
        times.sort()
        if times and container.format.name == "avi":
            # start_time is that of the first packet to decode; count from the first picture that is shown.
            self._origin = times[0]
            lower, upper = self._bounds(start, end)
        self._present, present = times.copy(), len(times)
        lost, spacing = self._lost(times, last, ended) if times and not stopped else (0, 0.0)
        self._limits.check_frames(present + lost)
        times += [times[-1] + round(spacing * number) for number in range(1, lost + 1)]
        begin, stop = bisect.bisect_left(times, lower), bisect.bisect_left(times, upper)
        return times[begin:stop], max(stop - max(begin, present), 0), sorted(keys)

    def _bounds(self, start: float | None, end: float | None) -> tuple[float, float]:
        """Return the times, in units of the time base, between which the part from `start` to `end` lies.

        Half a unit of tolerance makes rounded seconds select the intended frame.
        """
        base = float(_time_base(self._stream))
        lower = -np.inf if start is None else self._origin + start / base - 0.5
        return lower, np.inf if end is None else self._origin + end / base - 0.5

    def _lost(self, times: list[int], last: float, ended: float) -> tuple[int, float]:
        """Estimate how many pictures are missing at the end, and the time between them.

        Pictures are missing if the latest packet starts more than two frames before the announced end of the
        file, and ends more than one frame before it.

        Args:
          times: times of the pictures that exist, ascending.
          last: start of the latest packet of all streams that were read, in seconds.
          ended: end of the latest packet, in seconds.
        """
        stream = self._stream
        base = float(_time_base(stream))
        if stream.duration:
            announced = float((stream.duration + (stream.start_time or 0)) * _time_base(stream))
        else:
            announced = (self._container.duration or 0) / av.time_base
        gaps = np.diff(times) if len(times) > 1 else [1 / (base * float(stream.average_rate or 25))]
        usual, mean = float(np.median(gaps)), float(np.mean(gaps))
        # The larger one, because rates vary, and the last picture may be shown for long.
        spacing = base * max(usual, mean)
        if announced - last <= 2 * spacing or announced - ended <= spacing:
            return 0, 0.0
        usual = max(usual, 1.0)
        return max(round((announced / base - times[-1]) / usual) - 1, 0), usual

    def _neighbour(self, time: int, short_side: int) -> np.ndarray:
        """Return the nearest frame that can be decoded, or the earlier of two that are equally near.

        The result does not depend on which other frames are read.
        """
        here = bisect.bisect_left(self._times, time)
        for reach in _REACHES:
            near = self._times[max(here - reach, 0) : here + reach + 1]
            if found := self._decoded(set(near), short_side):
                return found[min(found, key=lambda other: (abs(other - time), other))]
        raise DecodeError(f"no frame near frame {here} of {self.count} can be decoded")

    def _decoded(self, times: set[int], short_side: int) -> dict[int, np.ndarray]:
        """Return the frames at these times; damaged ones are left out if damage is tolerated."""
        pictures: dict[Any, np.ndarray] = {}
        convert = VideoReformatter()  # one for all frames, because creating it takes longer than using it
        try:
            with decoding():
                for key, group in self._groups(times):
                    for frame in self._decode(key, group):
                        self.damaged |= frame.is_corrupt
                        with stage("convert"):
                            pictures[frame.pts] = _picture(frame, convert, short_side)
        except DecodeError as error:
            if self._stream.codec_context.width:
                raise
            limit = f"--config.data.max_pixels={self._limits.pixels}"
            raise DecodeError(f"{error}; its pictures may have more pixels than {limit} allows") from error
        return pictures

    def _groups(self, times: set[int]) -> Iterator[tuple[_Packet, set[int]]]:
        """Group wanted times by the key frame that their decoding starts from; yield (key frame, times)."""
        starts = [key.pts for key in self._keys]
        groups = collections.defaultdict(set)
        if self._is_packed and self._keys:
            yield self._keys[0], times
            return
        for time in times:
            groups[bisect.bisect_right(starts, time) - 1].add(time)
        if groups.pop(-1, None) and not self._limits.bad_frames:
            raise DecodeError("no key frame to start decoding from")
        for number in sorted(groups):
            yield self._keys[number], groups[number]

    def _decode(self, key: _Packet, wanted: set[int]) -> Iterator[av.VideoFrame]:
        """Yield the frames at the wanted times from a key frame on.

        Other frames are decoded only if frames are predicted from them. If damage is tolerated, packets that
        cannot be decoded are skipped.
        """
        if self._is_packed:
            yield from self._decode_packed(key, wanted)
            return
        codec, remaining = self._stream.codec_context, set(wanted)
        skipped: tuple[type[Exception], ...] = (av.FFmpegError,) if self._limits.bad_frames > 0 else ()
        for packet in self._packets_from(key):
            pts = _pts_dts(packet)[0]
            if codec.name in _SKIPPING:
                codec.skip_frame = "DEFAULT" if pts is None or pts in wanted else "NONREF"
            with contextlib.suppress(*skipped):
                yield from (frame for frame in packet.decode() if frame.pts in wanted)
            remaining.discard(pts)
            if not remaining:  # the decoder has all wanted packets, but may hold frames to reorder them
                with contextlib.suppress(*skipped):
                    yield from (frame for frame in codec.decode(None) if frame.pts in wanted)
                break

    def _decode_packed(self, key: _Packet, wanted: set[int]) -> Iterator[av.VideoFrame]:
        """Yield the frames at the wanted times; decode every frame from a key frame on.

        Packets of several frames give them wrong times, but decoders return them in the right order.
        """

        def decoded() -> Iterator[av.VideoFrame]:
            for packet in self._packets_from(key):
                yield from packet.decode()  # the last packet is empty, which flushes the decoder

        last = max(wanted)
        for time, frame in zip(self._present, decoded(), strict=False):
            frame.pts = time
            if time in wanted:
                yield frame
            if time == last:
                return

    def _packets_from(self, key: _Packet) -> Iterator[Packet]:
        """Yield the packets from a key frame on."""
        for target in key:  # some containers seek by presentation time, others by decoding time
            self._container.seek(target, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
            if first.size and _pts_dts(first)[1] <= key.dts:
                break
        for packet in itertools.chain([first], packets):
            if not packet.size or _pts_dts(packet)[1] >= key.dts:
                yield packet


def _logged_errors() -> int:
    """Return the number of errors that FFmpeg has logged in this process, in any of its threads."""
    return av.logging.get_last_error()[0]


class _Packet(NamedTuple):
    pts: int
    dts: int


def _time_base(stream: Stream) -> Fraction:
    """Return the time base of a stream: the unit of its times, in seconds."""
    if stream.time_base is None:
        raise DecodeError("a stream has no time base")
    return stream.time_base


def _pts_dts(packet: Packet) -> tuple[Any, Any]:
    """Return the presentation and the decoding time of a packet; if one is missing, the other replaces it."""
    pts, dts = packet.pts, packet.dts
    return (dts if pts is None else pts), (pts if dts is None else dts)


def _is_hidden(packet: Packet) -> bool:
    """Return whether a packet of VP8 is a hidden picture, which only serves to predict others."""
    return not bytes(packet)[0] >> 4 & 1


def _picture(frame: av.VideoFrame, convert: VideoReformatter, short_side: int) -> np.ndarray:
    scale = short_side / min(frame.width, frame.height) if short_side else 1
    size = {"width": round(frame.width * scale), "height": round(frame.height * scale)} if scale < 1 else {}
    picture = convert.reformat(
        frame, format="rgb24", interpolation="BILINEAR", threads=1, **size
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90)) if frame.rotation else picture


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return the frames of a clip as one array; raise a DecodeError if they differ in size."""
    if len(pictures) == 1:
        return pictures[0][None]
    if len({picture.shape for picture in pictures}) > 1:
        raise DecodeError("its frames differ in size")
    return np.stack(pictures)
