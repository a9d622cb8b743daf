"""Open the container of a video: a regular file or bytes in memory, of a format in `CONTAINERS`.

Playlists and session descriptions, which refer to other files and addresses, are refused before FFmpeg parses
them, and so are files that announce more than `Limits` allow.
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
from structvit_jax.utils.errors import DecodeError, decoding

# Containers that are opened, by FFmpeg's name, with their file extensions.
CONTAINERS = {
    "mov": (".mp4", ".mov", ".m4v", ".3gp"),
    "matroska": (".mkv", ".webm"),
    "avi": (".avi",),
    "mpegts": (".ts",),
    "asf": (".wmv", ".asf"),
    "flv": (".flv",),
}
_PROGRAM_STREAM = (".mpg", ".mpeg")  # found as videos, but refused with a reason
VIDEOS = (*(extension for extensions in CONTAINERS.values() for extension in extensions), *_PROGRAM_STREAM)
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}

# First bytes of containers other than MP4 and QuickTime.
_OTHERS = (b"RIFF", b"\x1a\x45\xdf\xa3", b"FLV", b"\x30\x26\xb2\x75", b"\x47")
_PER_SAMPLE = 0xF00  # flags of a fragment that stores values for each sample
_CHUNK = 2**20  # bytes of a header to search at a time
_FIELDS = 16  # maximal bytes of a box from its tag to the end of its count


def open_container(file: str | bytes, limits: Limits) -> InputContainer:
    """Open a video, given as a path or as bytes, to be decoded on one thread: workers are the parallelism.

    Raises:
      DecodeError: no file, no video, an unsupported container, or one that exceeds the limits.
    """
    options = _OPTIONS | {"max_pixels": str(limits.pixels)}
    with decoding():
        if isinstance(file, str) and os.path.isdir(file):
            raise DecodeError("a folder without pictures, not a video file")
        if not (file_size(file) if isinstance(file, str) else len(file)):
            raise DecodeError("empty file")
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            head = opened.read(4)
            if not head.startswith(_OTHERS):
                _check_boxes(opened, limits)
        if head == b"\0\0\1\xba":
            raise DecodeError(
                "an MPEG program stream does not keep the times of its frames; convert it to mp4"
            )
        if head.startswith(b"FLV"):  # FFmpeg decodes pictures of any size to find its streams
            with _open(file, options | {"codec_whitelist": "none"}) as container:
                _check_size(container, limits)
        container = _open(file, options)
    try:
        if problem := _unsupported(container):
            raise DecodeError(problem)
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
    except av.ArgumentError as error:  # FFmpeg refuses formats that are not whitelisted
        known = ", ".join(sorted(extension[1:] for extension in VIDEOS if extension not in _PROGRAM_STREAM))
        raise DecodeError(f"not a supported container ({known})") from error


def _check_size(container: InputContainer, limits: Limits) -> None:
    for stream in container.streams.video[:1]:
        if stream.codec_context is not None:
            limits.check_picture(stream.codec_context.width, stream.codec_context.height)


def _unsupported(container: InputContainer) -> str | None:
    """Return why the video of a container cannot be read, or None."""
    video = container.streams.video
    if not video:
        return "no video stream"
    if (codec := video[0].codec_context) is None:
        return "no decoder for its video codec"
    kind = container.format.name
    if kind == "avi" and codec.name in ("h264", "hevc") and codec.has_b_frames:
        return f"{codec.name} in {kind} does not keep the times of its frames; convert it to mp4 or mkv"
    return None


def _check_boxes(file: BinaryIO, limits: Limits) -> None:
    """Check the number of samples that an MP4 or QuickTime file announces, before FFmpeg opens it.

    FFmpeg allocates about 40 bytes per sample. Most tables have an entry for each sample, so that the file is
    as large; but a table of samples of equal size, and a fragment of samples with default values, store only
    a count: 1 kB can announce billions.

    Raises:
      DecodeError: more samples than `Limits.frames` and than bytes, or a compressed header.
    """
    samples, length = 0, file.seek(0, os.SEEK_END)
    for chunk in _headers(file, length):
        if b"cmov" in chunk:
            raise DecodeError("a QuickTime file with a compressed header; convert it to mp4")
        for size, count in _fields(chunk, b"stsz", 8):
            samples += count if size else 0
        for flags, count in _fields(chunk, b"trun", 4):
            samples += 0 if flags & _PER_SAMPLE else count
    if samples > length:
        limits.check_frames(samples)


def _headers(file: BinaryIO, length: int) -> Iterator[bytes]:
    """Yield the top-level boxes, except media data, in overlapping chunks."""
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
    """Yield two numbers, `offset` bytes after each occurrence of a tag that starts before the overlap."""
    at = chunk.find(tag)
    while 0 <= at < len(chunk) - _FIELDS:
        yield struct.unpack_from(">II", chunk, at + offset)
        at = chunk.find(tag, at + 4)
