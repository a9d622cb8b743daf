"""Keep decoded frames in memory that the training process and its data workers share.

The memory is an anonymous file: it vanishes with the last process, so a kill leaves nothing behind. Frames
stay until the end; if the memory is full, further examples are decoded every time. Its layout:

    used       int64: bytes that are taken, from the start of the file
    index      int64 [examples of all splits]: where the entry of an example starts; 0: it has none yet;
               -1: it is not cached
    entries    per example: a header, a flag per frame, and the pixels of all its frames

The flag of a frame is set after its pixels are written, so a frame that a killed process wrote in part is
never used. Reading takes no lock; the lock for adding entries ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from structvit_jax.data.workers import anonymous_file
from structvit_jax.utils.errors import UserError

_HEADER = struct.Struct("6i")  # label, count, missing, height, width, spanned
_SPANNED = 5  # position in the header
_ALIGNMENT = 64  # bytes
_EXCLUDED = -1


def entry_bytes(count: int, height: int, width: int) -> int:
    """Return the memory that an example of `count` frames takes."""
    return _aligned(_HEADER.size + count) + _aligned(count * height * width * 3)


def index_bytes(examples: int) -> int:
    """Return the memory that a cache takes without any frames."""
    return _aligned(8 + 8 * examples)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class FrameCache:
    """Memory for decoded frames; a copy that a data worker unpickles uses the same memory.

    Args:
      examples: number of examples of all splits.
      limit: size of the memory in bytes. It is taken from the system as frames are added.

    Attributes:
      descriptor: file descriptor of the memory; data workers have to inherit it.
      memory, bytes, read_only: the memory, and two views of it, uint8 [size].

    Raises:
      OSError, ValueError: the system does not provide it, or the index of the examples exceeds the limit.
    """

    def __init__(self, examples: int, limit: int):
        start = index_bytes(examples)
        self._examples, self._size = examples, limit // mmap.PAGESIZE * mmap.PAGESIZE
        if start > self._size:
            raise ValueError(f"the index of {examples} examples takes {start} bytes")
        self.descriptor = anonymous_file()
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, self._size)
        self._map()
        self._used[0] = start

    def _map(self) -> None:
        self._lock = threading.Lock()
        self.memory = mmap.mmap(self.descriptor, self._size)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.read_only = self.bytes.view()
        self.read_only.flags.writeable = False
        self._used = np.frombuffer(self.memory, np.int64, 1)
        self._index = np.frombuffer(self.memory, np.int64, self._examples, offset=8)

    def _identity(self) -> tuple[int, ...]:
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino, status.st_size

    def __getstate__(self) -> tuple[Any, ...]:
        return self.descriptor, self._examples, self._size, self._identity()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Use the memory of the process that pickled the cache, whose descriptor this process inherited.

        Raises:
          UserError: it did not.
        """
        self.descriptor, self._examples, self._size, identity = state
        try:
            if self._identity() != identity:
                raise OSError("another file has its descriptor")
            self._map()
        except (OSError, ValueError) as error:
            raise UserError(
                f"the cache of decoded frames cannot be shared with a data worker ({error}); turn it off with"
                " --config.data.cache=off"
            ) from error
        weakref.finalize(self, os.close, self.descriptor)

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return int(self._used[0])

    def entry(self, example: int) -> Entry | None:
        """Return the entry of an example, or None if it has none."""
        offset = self._index.item(example)
        return Entry(self, offset) if offset > 0 else None

    def exclude(self, example: int) -> None:
        """Do not cache an example any more."""
        self._index[example] = _EXCLUDED

    def is_excluded(self, example: int) -> bool:
        return self._index.item(example) == _EXCLUDED

    def add(self, example: int, label: int, count: int, missing: int, size: tuple[int, int]) -> Entry | None:
        """Return a new entry for an example, or the one that another reader has added.

        If there is not enough memory left, exclude the example and return None.

        Raises:
          OSError: the system does not provide the memory.
        """
        with self._locked():
            if not self._index.item(example):
                begin = self.used
                end = begin + entry_bytes(count, *size)
                if end > self._size:
                    self.exclude(example)
                    return None
                # If the process is killed between these lines, the memory is lost, but nothing else.
                self._used[0] = end
                os.pwrite(self.descriptor, _HEADER.pack(label, count, missing, *size, 0), begin)
                self._index[example] = begin
        return self.entry(example)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:  # locks of files are between processes
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN)


class Entry:
    """The frames of an example in a cache.

    Attributes:
      label: class of the example, as its source numbers it.
      count, missing: see `Media`.
      ready: uint8 [count], 1 for frames that are stored.
      pixels: uint8 [count, height, width, 3], read-only.
    """

    __slots__ = ("_cache", "_offset", "_start", "count", "label", "missing", "pixels", "ready")

    def __init__(self, cache: FrameCache, offset: int):
        self._cache, self._offset = cache, offset
        self.label, self.count, self.missing, height, width, _ = _HEADER.unpack_from(cache.memory, offset)
        flags = offset + _HEADER.size
        self.ready = cache.bytes[flags : flags + self.count]
        self._start = offset + _aligned(_HEADER.size + self.count)
        stop = self._start + self.count * height * width * 3
        self.pixels = cache.read_only[self._start : stop].reshape(self.count, height, width, 3)

    def frames(self, wanted: Sequence[int]) -> np.ndarray | None:
        """Return frames, read-only or as a copy; None if one is not stored."""
        first, length = wanted[0], len(wanted)
        if length == 1 or list(wanted) == list(range(first, first + length)):
            stop = first + length
            return self.pixels[first:stop] if self.ready[first:stop].all() else None
        numbers = np.asarray(wanted)
        return self.pixels[numbers] if self.ready[numbers].all() else None

    def unready(self, wanted: Sequence[int]) -> list[int]:
        """Return the wanted frames that are not stored, each once."""
        return [number for number in sorted(set(wanted)) if not self.ready[number]]

    def store(self, numbers: Sequence[int], pictures: np.ndarray) -> None:
        """Store frames, uint8 [len(numbers), height, width, 3].

        Raises:
          OSError: there is no memory for them.
        """
        for number, picture in zip(numbers, pictures, strict=True):
            if not self.ready[number]:
                # System calls do not reorder memory accesses, and raise an error if a disk is full.
                start = self._start + number * picture.nbytes
                data = np.ascontiguousarray(picture).data
                if os.pwrite(self._cache.descriptor, data, start) < data.nbytes:
                    raise OSError("no memory")
                self.ready[number] = 1

    def due(self, wanted: Sequence[int]) -> bool:
        """Return whether to store all frames now, because a video is decoded in part again and again.

        This is so if its visits, this one included, have spanned as many frames as it has. Until then, the
        visits have cost less than decoding it as a whole, so few epochs do not pay for frames of later ones.
        """
        spanned = self._spanned
        return spanned >= 0 and spanned + _span(wanted) >= self.count

    def visited(self, wanted: Sequence[int]) -> None:
        """Count frames that were decoded for a visit."""
        if self._spanned >= 0:
            self._spanned = min(self._spanned + _span(wanted), self.count)

    def never_due(self) -> None:
        """Do not store all frames, because some cannot be decoded."""
        self._spanned = -1

    @property
    def _spanned(self) -> int:
        return _HEADER.unpack_from(self._cache.memory, self._offset)[_SPANNED]

    @_spanned.setter
    def _spanned(self, value: int) -> None:
        struct.pack_into("i", self._cache.memory, self._offset + 4 * _SPANNED, value)


def _span(wanted: Sequence[int]) -> int:
    return max(wanted) - min(wanted) + 1
