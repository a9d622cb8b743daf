"""Copy the videos of a data set to files that decode fast: `structvit prepare ... --transcode=256 --out=DIR`.

Copies are in DIR/clips, and originals are never written. A copy gets its name when it is complete and on the
disk, so a file with such a name can be used whatever happens to the run. Unfinished files are in
DIR/clips.unfinished; the next run removes them. Re-running keeps the copies that are up to date.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from structvit_jax.data.encode import LONGEST_INTERVAL, Record, read_record, same_part, write_copy
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import Entry, Index
from structvit_jax.data.limits import Limits, file_size
from structvit_jax.data.media import configure_decoding, without_extension
from structvit_jax.data.video import VideoFile
from structvit_jax.data.workers import Note, in_processes
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, printable
from structvit_jax.utils.paths import write_errors_as_user_error

_CLIPS = "clips"
_UNFINISHED = "clips.unfinished"
_LOCK = "clips.lock"
_AHEAD = 4  # largest number of videos in the queue of each worker
_THREADS = 16  # that look for copies from earlier runs; on a network drive most of their time is waiting
_FIRST = 3  # copies from which the space for the others is estimated
_MARGIN = 1.1  # factor on this estimate
_LOW_PSNR = 35.0  # dB; name the worst copy if it is below
_NAME_LIMIT = 255  # bytes in the name of a file
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors of one path; other errors of writing concern all copies.
_OWN_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)

Part = tuple[float | None, float | None]  # start and end in seconds


class Job(NamedTuple):
    """A video to copy."""

    path: str  # absolute
    copy: str  # absolute
    parts: tuple[Part, ...]  # of its examples
    limits: Limits
    size: int = 0  # bytes; 0 if it cannot be read
    kept: Record | None = None  # of a copy from an earlier run that is up to date


class Outcome(NamedTuple):
    """The result of a job: a copy, or the reason why the original is used."""

    record: Record | None = None
    parts: tuple[Part, ...] = ()  # start and end of the examples in the copy
    reason: str = ""
    is_problem: bool = False  # whether the reason is a problem of the file


_KILLED = Outcome(reason="kills the process that copies it", is_problem=True)


def transcode(
    splits: Mapping[str, Index],
    base: str,
    searched: Sequence[str],
    out: str,
    short_side: int,
    workers: int,
) -> dict[str, Index]:
    """Copy the videos of all splits, and print a summary.

    Args:
      splits: the examples.
      base: the folder of the data. Names of copies follow the names of the originals in it.
      searched: folders that are searched for data; `out` may not be in them.
      out: the folder to write to.
      short_side: short side of the copies in pixels; smaller videos are not enlarged.
      workers: number of processes.

    Returns:
      The splits with the copies; examples without a copy have their originals.

    Raises:
      UserError: `out` is among the data, holds other clips, or cannot be written; another run writes to it;
        or the disk is too small. Complete copies remain, and the next run keeps them.
    """
    out = os.path.abspath(out)
    examples = _examples(splits)
    _check_out(out, searched, examples)
    names = _copy_names([path for path in examples if not path.lower().endswith(IMAGES)], base)
    limits = next(iter(splits.values())).limits
    jobs = [
        Job(path, os.path.join(out, _CLIPS, name), tuple(sorted(examples[path], key=str)), limits)
        for path, name in names.items()
    ]
    with write_errors_as_user_error(out), _only_run(out), _scratch(os.path.join(out, _UNFINISHED)) as scratch:
        run = _Run(out, jobs, short_side, scratch)
        outcomes = run.work(workers)
        for folder in {os.path.dirname(job.copy) for job, outcome in outcomes if outcome.record}:
            _sync(folder)
    print(_summary(run, outcomes, len(examples) - len(jobs)))
    copies = {
        job.path: (job.copy, dict(zip(job.parts, outcome.parts, strict=True)))
        for job, outcome in outcomes
        if outcome.record
    }
    return {name: _with_copies(index, out, copies) for name, index in splits.items()}


def _examples(splits: Mapping[str, Index]) -> dict[str, set[Part]]:
    """Return the absolute paths of all examples in order, with the start and end of their parts."""
    examples: dict[str, set[Part]] = {}
    for index in splits.values():
        for number in range(len(index)):
            entry = index.entry(number)
            parts = examples.setdefault(os.path.abspath(index.path(number)), set())
            if entry.is_part:
                parts.add((entry.start, entry.end))
    return examples


def _check_out(out: str, searched: Iterable[str], originals: Iterable[str]) -> None:
    """Check that copies in a folder can neither replace originals nor be found as data."""
    for source in map(_resolved, searched):
        if _resolved(out).startswith(source):
            raise UserError(
                f"{out} is in the data folder {source}; choose a folder for the copies outside it"
            )
    clips = os.path.join(out, _CLIPS)
    folders = {os.path.dirname(path) for path in originals}
    if any(_resolved(folder).startswith(_resolved(clips)) for folder in folders):
        raise UserError(f"{clips} holds originals, which copies might replace; choose another --out")
    if os.path.exists(clips) and not os.path.exists(os.path.join(out, _LOCK)):
        raise UserError(f"{clips} exists and was not written by --transcode; choose another --out")


def _resolved(folder: str) -> str:
    """Return the absolute path of a folder without links, with a separator at the end."""
    return os.path.join(os.path.realpath(folder), "")


def _copy_names(paths: Sequence[str], base: str) -> dict[str, str]:
    """Return a different name for the copy of each path, relative to the folder of copies."""
    names = {}
    for path in paths:
        name = os.path.relpath(path, base)
        inside = not name.startswith(os.pardir + os.sep)
        names[path] = without_extension(name if inside else path.lstrip(os.sep)) + ".mp4"
    same = collections.Counter(name.casefold() for name in names.values())
    for path, name in names.items():
        folder, short = os.path.split(name)
        if same[name.casefold()] > 1 or len(os.fsencode(short)) > _NAME_LIMIT:
            ending = f"-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}.mp4"
            short = os.fsdecode(os.fsencode(short[:-4])[: _NAME_LIMIT - len(ending)]) + ending
            names[path] = os.path.join(folder, short)
    return names


def _with_copies(index: Index, out: str, copies: Mapping[str, tuple[str, Mapping[Part, Part]]]) -> Index:
    """Return a split in which the copies replace their originals; labels stay as they are."""
    entries: list[Entry] = []
    for number in range(len(index)):
        entry, path = index.entry(number), os.path.abspath(index.path(number))
        if path not in copies:
            entries.append(entry._replace(path=path))
            continue
        copy, parts = copies[path]
        start, end = parts[entry.start, entry.end] if entry.is_part else (None, None)
        entries.append(entry._replace(path=os.path.relpath(copy, out), start=start, end=end))
    return Index(out, entries, index.class_names, limits=index.limits, notes=index.notes)


@contextlib.contextmanager
def _only_run(out: str) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it however the process ends."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, _LOCK), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing copies to {out}; wait until it ends") from error
        yield


@contextlib.contextmanager
def _scratch(folder: str) -> Iterator[str]:
    """Provide an empty folder for unfinished files; those of killed runs are removed."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: str) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Run:
    """One run over all videos.

    Attributes:
      frames: number of frames in the copies made so far.
      seconds: duration.
    """

    def __init__(self, out: str, jobs: Sequence[Job], short_side: int, scratch: str):
        self._out, self._short_side, self._scratch = out, short_side, scratch
        with ThreadPoolExecutor(_THREADS) as pool:
            self._jobs = list(pool.map(self._look_up, jobs))
        self._read = self._written = self._copies = 0  # bytes of originals and of copies; number of copies
        self._pending = sum(job.size for job in self._jobs)  # bytes of originals
        self.frames, self.seconds = 0, 0.0

    def _look_up(self, job: Job) -> Job:
        """Add the size of the original, and the record of its copy if that is up to date."""
        try:
            size, status = file_size(job.path), os.stat(job.path)
        except (DecodeError, OSError):  # copying reports it
            return job
        record = read_record(job.copy)
        return job._replace(
            size=size, kept=record if record and record.is_of(status, self._short_side) else None
        )

    def work(self, workers: int) -> list[tuple[Job, Outcome]]:
        """Return all jobs with their outcomes."""
        outcomes: dict[int, Outcome] = {}
        for number, job in enumerate(self._jobs):
            if job.kept:
                self._count(job, copied=True)
                if job.kept.same_times or not job.parts:
                    outcomes[number] = Outcome(job.kept, job.parts)
        todo = [number for number in range(len(self._jobs)) if number not in outcomes]
        # In random order, so that the first copies are typical in size and time.
        todo = np.random.default_rng(0).permutation(np.array(todo, int)).tolist()
        started = time.monotonic()
        try:
            with (
                tqdm(
                    total=len(todo), unit="file", file=sys.stderr, desc="transcoding", disable=not todo
                ) as bar,
                contextlib.closing(self._results(todo, workers)) as results,
            ):
                self._check_space()
                for number, outcome in zip(todo, results, strict=True):
                    outcomes[number] = outcome
                    self._report(self._jobs[number], outcome, bar)
                    self.seconds = time.monotonic() - started
                    bar.set_postfix_str(f"{self.frames / self.seconds:,.0f} frames/s", refresh=False)
                    bar.update()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self._full_disk() from error
        return [(job, outcomes[number]) for number, job in enumerate(self._jobs)]

    def _report(self, job: Job, outcome: Outcome, bar: tqdm) -> None:
        if outcome.is_problem:
            bar.write(f"{printable(job.path)}: {outcome.reason}", file=sys.stdout)
        if not job.kept:
            self.frames += outcome.record.frames if outcome.record else 0
            self._count(job, copied=outcome.record is not None)
            self._check_space()

    def _results(self, numbers: Sequence[int], workers: int) -> Generator[Outcome]:
        jobs, short_side, scratch = self._jobs, self._short_side, self._scratch

        def process(number: int, note: Note) -> Outcome:
            return _process(jobs[number], short_side, os.path.join(scratch, f"{number}.mp4"))

        return in_processes(
            process, numbers, workers, ahead=_AHEAD, on_death=lambda worker: _KILLED, setup=configure_decoding
        )

    def _count(self, job: Job, *, copied: bool) -> None:
        self._pending -= job.size
        self._read += job.size
        if copied:
            self._copies += 1
            self._written += os.path.getsize(job.copy)

    def _needed(self) -> float:
        """Return the estimated number of bytes that the remaining copies need."""
        return _MARGIN * self._pending * self._written / max(self._read, 1)

    def _check_space(self) -> None:
        if self._copies >= _FIRST and self._needed() > shutil.disk_usage(self._out).free:
            raise self._full_disk()

    def _full_disk(self) -> UserError:
        needed, free = map(_size_text, (self._needed(), shutil.disk_usage(self._out).free))
        more = f"the remaining copies need about {needed}, and" if self._copies else "no copy fits:"
        return UserError(
            f"{self._out}: {more} {free} is free. Free some space and re-run the command, which keeps the"
            f" {self._copies:,} copies that are complete; or choose another --out"
        )


def _process(job: Job, short_side: int, unfinished: str) -> Outcome:
    """Make the copy of a video unless there is one; `unfinished` is the file to write to."""
    try:
        if os.path.isdir(job.path):
            return Outcome(reason="a folder of frames")
        file_size(job.path)
        original = os.stat(job.path)
        with contextlib.closing(VideoFile(job.path, limits=job.limits)) as video:
            record = job.kept
            if not record:
                if _needs_no_copy(video, short_side):
                    return Outcome(reason="small, with frequent key frames")
                record = write_copy(unfinished, video, original, short_side)
                os.makedirs(os.path.dirname(job.copy), exist_ok=True)
                os.replace(unfinished, job.copy)
            parts = job.parts
            if parts and not record.same_times:
                with contextlib.closing(VideoFile(job.copy)) as copy:
                    parts = tuple(same_part(video, copy, *part) for part in parts)
            return Outcome(record, parts)
    except DecodeError as error:
        return Outcome(reason=str(error), is_problem=True)
    except MemoryError:
        return Outcome(reason="needs more memory than is available", is_problem=True)
    except OSError as error:
        if error.errno in _OWN_ERRORS:
            return Outcome(reason=f"its copy cannot be written: {error.strerror}", is_problem=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(unfinished)


def _needs_no_copy(video: VideoFile, short_side: int) -> bool:
    """Return whether a complete video is small, and decoding can start near every frame."""
    is_small = 0 < min(video.size) <= short_side
    return is_small and not video.missing and video.key_interval() <= LONGEST_INTERVAL


def _size_text(size: float) -> str:
    return tqdm.format_sizeof(size, "B")


def _summary(run: _Run, outcomes: Sequence[tuple[Job, Outcome]], images: int) -> str:
    """Return lines about the copies, their size and their quality, and about files without a copy."""
    copied = [(job, outcome.record) for job, outcome in outcomes if outcome.record]
    kept = sum(job.kept is not None for job, _ in copied)
    rate = run.frames / max(run.seconds, 1e-9)
    lines = [
        f"copies  {len(copied) - kept:,} made ({run.frames:,} frames, {rate:,.0f} per second), {kept:,} kept"
    ]
    if copied:
        before, after = (
            sum(job.size for job, _ in copied),
            sum(os.path.getsize(job.copy) for job, _ in copied),
        )
        lines.append(f"size    {_size_text(before)} before, {_size_text(after)} after")
        psnr, ssim = ([getattr(record, key) for _, record in copied] for key in ("psnr", "ssim"))
        lines.append(f"PSNR    median {statistics.median(psnr):.1f} dB, lowest {min(psnr):.1f} dB")
        lines.append(f"SSIM    median {statistics.median(ssim):.4f}, lowest {min(ssim):.4f}")
        worst = copied[int(np.argmin(psnr))][0]
        if min(psnr) < _LOW_PSNR:
            lines.append(f"lowest PSNR: {printable(worst.path)}")
    reasons = collections.Counter(
        "damaged or unreadable (see above)" if outcome.is_problem else outcome.reason
        for _, outcome in outcomes
        if not outcome.record
    )
    if images:
        reasons["an image"] = images
    if reasons:
        listed = "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        lines.append(f"without a copy, the lists have the originals: {listed}")
    return "\n".join(lines)
