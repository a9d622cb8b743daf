"""Read the examples of a data set through a cache of their decoded frames.

config.data.cache is "on", "off" or "auto": on if the data are files whose decoded frames fit into the memory
that config.data.cache_gib allows.

Batches are the same with and without the cache. If a file is damaged, the pixels of a frame can depend on
which other frames are decoded. So frames are only cached if the decoder reported no error. If it reports one
for an example that is in the cache, the example is read from its file from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from structvit_jax.data.frame_cache import Entry, FrameCache, entry_bytes, index_bytes
from structvit_jax.data.media import configure_decoding
from structvit_jax.data.stages import stage
from structvit_jax.data.survey import typical
from structvit_jax.data.types import DataOptions, Media, Source
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

_FRACTION = 4  # by default, the cache takes up to 1/4 of the available memory
_CHUNK = 2**26  # bytes of frames to decode at a time when a whole video is added
_CGROUPS = Path("/sys/fs/cgroup")


def open_cache(sources: Sequence[Source], options: DataOptions) -> tuple[list[CachedSource], str]:
    """Open a cache for the splits of a data set, if config.data.cache asks for one.

    Returns:
      The cached splits, or [] without a cache.
      One line that states what was decided; "" if there is nothing to state.
    """
    generated = all(hasattr(source, "made_from") for source in sources)
    if options.cache == "off" or (options.cache == "auto" and generated):
        return [], ""
    limit = int(options.cache_gib * 2**30) or available_memory() // _FRACTION
    needed = _needed(sources, options.short_side)
    if options.cache == "auto" and not 0 < needed <= limit:
        reason = f"decoded frames need about {_text(needed)}, and the limit is {_text(limit)}"
        return [], f"cache: off, {reason}" * (needed > 0)
    try:
        cache = FrameCache(sum(map(len, sources)), limit)
    except (OSError, ValueError, OverflowError) as error:
        return [], f"cache: off, no shared memory of {_text(limit)} ({error})"
    configure_decoding()  # frames of damaged files are recognised by errors that decoders log
    first = np.cumsum([0, *map(len, sources)]).tolist()
    cached = [
        CachedSource(source, cache, start, options.short_side)
        for source, start in zip(sources, first, strict=False)
    ]
    used = f"about {_text(needed)} of at most {_text(limit)}"
    if needed > limit:
        used = f"{_text(limit)} of about {_text(needed)}"
    return cached, f"cache: decoded frames are kept in memory, {used}"


def _needed(sources: Sequence[Source], short_side: int) -> int:
    """Estimate the memory for the frames of all examples in bytes; 0 if none can be read."""
    try:
        width, height, frames, _ = typical(sources[0])
    except UserError:
        return 0
    scale = min(short_side / min(width, height), 1) if short_side else 1
    size = round(height * scale), round(width * scale)
    examples = sum(map(len, sources))
    return index_bytes(examples) + examples * entry_bytes(frames, *size)


def _text(size: int) -> str:
    number, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if number >= 1000:
            number, unit = number / 1024, larger
    return f"{number:,.{0 if number >= 100 else 1}f} {unit}"


def available_memory() -> int:
    """Return the memory in bytes that this process can take without swapping, limits of cgroups included."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
        free += _free_in_cgroups(Path("/proc/self/cgroup").read_text())
    except OSError:  # not Linux
        pass
    return max(min(free), 0)


def _free_in_cgroups(membership: str) -> Iterator[int]:
    """Yield the free memory of the process's control group and of those that contain it.

    Files in the page cache count as free.

    Args:
      membership: content of /proc/self/cgroup; "0::/a/b" is version 2, "4:memory:/a/b" version 1.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names, inactive = _CGROUPS / "memory", ("limit_in_bytes", "usage_in_bytes"), "total_"
        elif not controllers:
            top, names, inactive = _CGROUPS, ("max", "current"), ""
        else:
            continue
        # Inside a container, the path may be that of the host; then only the top exists.
        for group in (PurePosixPath(path.lstrip("/")), *PurePosixPath(path.lstrip("/")).parents):
            folder = top / group
            try:
                most, used = ((folder / f"memory.{name}").read_text().strip() for name in names)
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most.isdecimal():
                cached = sum(int(stat.get(f"{inactive}{kind}_file", 0)) for kind in ("inactive", "active"))
                yield int(most) - int(used) + cached


class CachedSource:
    """Open the examples of a source through a cache.

    Args:
      source: one split.
      cache: memory for all splits.
      first: number of examples of the splits before this one.
      short_side: frames of this short side are cached; other sizes are decoded every time.
    """

    def __init__(self, source: Source, cache: FrameCache, first: int, short_side: int):
        self.source, self.cache, self._first, self.short_side = source, cache, first, short_side

    def open(self, index: int) -> tuple[Media, int]:
        """Return the frames and the label of an example, see `Source.open`; open its file only if needed.

        Raises:
          DecodeError: the example cannot be read.
        """
        example = self._first + index
        if entry := self.cache.entry(example):
            return _CachedMedia(self, index, example, entry.label, entry, None), entry.label
        media, label = self.source.open(index)
        if self.cache.is_excluded(example):
            return media, label
        return _CachedMedia(self, index, example, label, None, media), label


class _CachedMedia(Media):
    """Frames from a cache, and the missing ones from the file, which are then added to the cache."""

    def __init__(
        self,
        source: CachedSource,
        index: int,
        example: int,
        label: int,
        entry: Entry | None,
        media: Media | None,
    ):
        self._source, self._index, self._example, self._label = source, index, example, label
        self._entry, self._media = entry, media
        known: Any = entry or media
        self.count, self.missing = known.count, known.missing

    def close(self) -> None:
        if self._media:
            self._media.close()
            self._media = None

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        cache = self._source.cache
        if short_side != self._source.short_side or cache.is_excluded(self._example):
            return self._decoded(wanted, short_side)
        self.check_available(wanted)
        entry = self._entry
        if entry is None:
            pictures = self._decoded(wanted, short_side)
            self._add(wanted, pictures)
            return pictures
        stored = entry.frames(wanted)
        if stored is None and self._complete(entry, wanted):
            stored = entry.frames(wanted)
        if stored is not None:
            self.repaired = 0
            return stored
        cache.exclude(self._example)
        self.close()  # a decoder that failed may give other frames
        return self._decoded(wanted, short_side)

    def _decoded(self, wanted: Sequence[int], short_side: int) -> np.ndarray:
        """Return frames from the file, and set `repaired` and `damaged`."""
        media = self._opened()
        pictures = media.frames(wanted, short_side)
        self.repaired, self.damaged = media.repaired, media.damaged
        return pictures

    def _opened(self) -> Media:
        if self._media is None:
            with stage("open"):
                self._media = self._source.source.open(self._index)[0]
        return self._media

    def _add(self, wanted: Sequence[int], pictures: np.ndarray) -> None:
        """Make an entry with the first frames of an example."""
        if self.damaged:
            return
        cache, size = self._source.cache, pictures.shape[1:3]
        try:
            entry = cache.add(self._example, self._label, self.count, self.missing, size)
            if entry and entry.pixels.shape == (self.count, *size, 3):
                entry.store(wanted, pictures)
                entry.visited(wanted)
                self._entry = entry
        except OSError:  # no memory
            cache.exclude(self._example)

    def _complete(self, entry: Entry, wanted: Sequence[int]) -> bool:
        """Store the wanted frames that are missing, and return whether this was possible."""
        if entry.due(wanted):
            if self._store(entry, entry.unready(range(self.count - self.missing))):
                return True
            entry.never_due()
            self.close()  # a decoder that failed may give other frames
        entry.visited(wanted)
        return self._store(entry, entry.unready(wanted))

    def _store(self, entry: Entry, numbers: Sequence[int]) -> bool:
        """Decode and store frames; return False if they are damaged or differ in size, or memory is full."""
        size = entry.pixels.shape[1:]
        step = max(_CHUNK // int(np.prod(size)), 1)
        try:
            for start in range(0, len(numbers), step):
                chunk = numbers[start : start + step]
                pictures = self._decoded(chunk, self._source.short_side)
                if self.damaged or pictures.shape[1:] != size:
                    return False
                entry.store(chunk, pictures)
        except (DecodeError, OSError):
            return False
        return True
