"""Open the container of a video: a regular file, or bytes in memory, in a format of `CONTAINERS`.

Playlists and session descriptions, which refer to other files and addresses, are rejected before FFmpeg
parses them. So are files that announce more than `Limits` allow.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import av
from av.container import InputContainer

from structvit_jax.data.limits import Limits, file_size
from structvit_jax.utils.failures import DecodeError, decoding

# FFmpeg's names of the containers that are opened, with their file extensions.
CONTAINERS = {
    "mov": (".mp4", ".mov", ".m4v", ".3gp"),
    "matroska": (".mkv", ".webm"),
    "avi": (".avi",),
    "mpegts": (".ts",),
    "asf": (".wmv", ".asf"),
    "flv": (".flv",),
}
_SUPPORTED = tuple(extension for extensions in CONTAINERS.values() for extension in extensions)
# .mpg and .mpeg files count as videos, but most are MPEG program streams, which are rejected with a reason.
VIDEOS = (*_SUPPORTED, ".mpg", ".mpeg")
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}

# First bytes of the containers that do not consist of boxes, as MP4 and QuickTime files do.
_WITHOUT_BOXES = (b"RIFF", b"\x1a\x45\xdf\xa3", b"FLV", b"\x30\x26\xb2\x75", b"\x47")
_PER_SAMPLE = 0xF00  # flags of a fragment ("trun") that stores values for each sample
_CHUNK = 2**20  # bytes of a header to search at a time
_FIELDS = 16  # maximum number of bytes from the start of a box's tag to the end of its sample count


def open_container(file: str | bytes, limits: Limits) -> InputContainer:
    """Open a video, given as a path or as bytes. Decoding uses one thread, because data workers are parallel.

    Raises:
      DecodeError: the file does not exist, has no video or an unsupported container, or exceeds the limits.
    """
    options = _OPTIONS | {"max_pixels": str(limits.pixels)}
    with decoding():
        if isinstance(file, str) and os.path.isdir(file):
            raise DecodeError("a folder without pictures, not a video file")
        if not (file_size(file) if isinstance(file, str) else len(file)):
            raise DecodeError("empty file")
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            head = opened.read(4)
            if not head.startswith(_WITHOUT_BOXES):
                _check_boxes(opened, limits)
        if head == b"\0\0\1\xba":
            raise DecodeError(
                "an MPEG program stream does not keep the times of its frames; convert it to mp4"
            )
        if head.startswith(b"FLV"):
            # To find the streams of FLV, FFmpeg decodes pictures of any size. Check the size first, without
            # decoders.
            with _open(file, options | {"codec_whitelist": "none"}) as container:
                _check_size(container, limits)
        container = _open(file, options)
        try:
            _check_codec(container)
            _check_size(container, limits)
        except DecodeError:
            container.close()
            raise
    codec = container.streams.video[0].codec_context
    codec.thread_count, codec.options = 1, {"max_pixels": options["max_pixels"]}
    return container


def _open(file: str | bytes, options: dict[str, str]) -> InputContainer:
    source = io.BytesIO(file) if isinstance(file, bytes) else f"file:{file}"
    try:
        return av.open(source, "r", options=options, metadata_errors="replace")
    except av.ArgumentError as error:  # raised if the format is not in the whitelist
        known = ", ".join(sorted(extension[1:] for extension in _SUPPORTED))
        raise DecodeError(f"not a supported container ({known})") from error


def _check_size(container: InputContainer, limits: Limits) -> None:
    for stream in container.streams.video[:1]:
        if stream.codec_context is not None:
            limits.check_picture(stream.codec_context.width, stream.codec_context.height)


def _check_codec(container: InputContainer) -> None:
    """Raise a DecodeError if a container has no video, no decoder for it, or no times of its frames."""
    if not container.streams.video:
        raise DecodeError("no video stream")
    if (codec := container.streams.video[0].codec_context) is None:
        raise DecodeError("no decoder for its video codec")
    kind = container.format.name
    if kind == "avi" and codec.name in ("h264", "hevc") and codec.has_b_frames:
        raise DecodeError(
            f"{codec.name} in {kind} does not keep the times of its frames; convert it to mp4 or mkv"
        )


def _check_boxes(file: BinaryIO, limits: Limits) -> None:
    """Check the number of samples that an MP4 or QuickTime file announces, before FFmpeg opens it.

    FFmpeg allocates about 40 bytes per sample. Most tables have an entry per sample, so only a large file can
    announce many. But a table of samples of equal size, or a fragment of samples with default values, stores
    only their number: a file of 1 kB can announce billions of samples.

    Raises:
      DecodeError: the number of samples exceeds both `Limits.frames` and the size of the file in bytes, or
        the header is compressed.
    """
    samples, length = 0, file.seek(0, os.SEEK_END)
    for chunk in _headers(file, length):
        if b"cmov" in chunk:
            raise DecodeError("a QuickTime file with a compressed header; convert it to mp4")
        samples += sum(count for size, count in _fields(chunk, b"stsz", 8) if size)
        samples += sum(count for flags, count in _fields(chunk, b"trun", 4) if not flags & _PER_SAMPLE)
    if samples > length:
        limits.check_frames(samples)


def _headers(file: BinaryIO, length: int) -> Iterator[bytes]:
    """Yield the top-level boxes, except media data, in chunks that overlap by `_FIELDS` bytes."""
    start = 0
    while start + 16 <= length:
        file.seek(start)
        size, kind, long = struct.unpack(">I4sQ", file.read(16))
        size = {0: length - start, 1: long}.get(size, size)
        if size < 8:
            return
        stop = min(start + size, length)
        for position in range(start, stop, _CHUNK) if kind != b"mdat" else ():
            file.seek(position)
            padded = min(_CHUNK, stop - position) + _FIELDS
            yield file.read(padded).ljust(padded, b"\0")
        start += size


def _fields(chunk: bytes, tag: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the two numbers at `offset` from each occurrence of a tag that starts before the overlap."""
    at = chunk.find(tag)
    while 0 <= at < len(chunk) - _FIELDS:
        yield struct.unpack_from(">II", chunk, at + offset)
        at = chunk.find(tag, at + 4)
