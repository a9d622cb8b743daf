"""Copy the videos of a data set to files that decode fast: `structvit prepare ... --transcode=256 --out=DIR`.

Copies are in DIR/clips. A copy gets its name when it is complete and on the disk, so every file there can be
used, whatever happens to the run. Re-running keeps copies that are up to date. Originals are never written.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import shutil
import statistics
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from structvit_jax.data import copies
from structvit_jax.data.encode import LONGEST_INTERVAL, Record, read_record, same_part, write_copy
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import Entry, Index
from structvit_jax.data.limits import Limits, file_size
from structvit_jax.data.media import configure_decoding
from structvit_jax.data.video import VideoFile
from structvit_jax.data.workers import Note, in_processes
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, printable
from structvit_jax.utils.paths import write_errors_as_user_error

_AHEAD = 4  # largest number of videos in the queue of each worker
_THREADS = 16  # that look for copies from earlier runs; on a network drive most of their time is waiting
_FIRST = 3  # copies from which the space for the others is estimated
_MARGIN = 1.1  # factor on this estimate
_LOW_PSNR = 35.0  # dB; name the worst copy if it is below
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
    outdated: int = 0  # bytes of the file that the copy will replace
    kept: Record | None = None  # of a copy from an earlier run that is up to date


class Outcome(NamedTuple):
    """The result of a job: a copy, or the reason why the original is used."""

    record: Record | None = None
    parts: tuple[Part, ...] = ()  # start and end of the examples in the copy
    reason: str = ""
    is_problem: bool = False  # whether the reason is a problem of this file, rather than a kind of files


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
    copies.check_folder(out, searched, examples)
    names = copies.choose_names([path for path in examples if not path.lower().endswith(IMAGES)], base)
    limits = next(iter(splits.values())).limits
    jobs = [
        Job(path, os.path.join(out, copies.CLIPS, name), tuple(sorted(examples[path], key=str)), limits)
        for path, name in names.items()
    ]
    with copies.only_run(out) as unfinished:
        run = _Run(out, jobs, short_side, unfinished)
        with write_errors_as_user_error(out):
            outcomes = run.work(workers)
            copies.sync({os.path.dirname(job.copy) for job, outcome in outcomes if outcome.record})
    print(_summary(run, outcomes, len(examples) - len(jobs)))
    made = {
        job.path: (job.copy, dict(zip(job.parts, outcome.parts, strict=True)))
        for job, outcome in outcomes
        if outcome.record
    }
    return {name: _with_copies(index, out, made) for name, index in splits.items()}


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


def _with_copies(index: Index, out: str, made: Mapping[str, tuple[str, Mapping[Part, Part]]]) -> Index:
    """Return a split in which the copies replace their originals; labels stay as they are."""
    entries: list[Entry] = []
    for number in range(len(index)):
        entry, path = index.entry(number), os.path.abspath(index.path(number))
        if path not in made:
            entries.append(entry._replace(path=path))
            continue
        copy, parts = made[path]
        start, end = parts[entry.start, entry.end] if entry.is_part else (None, None)
        entries.append(entry._replace(path=os.path.relpath(copy, out), start=start, end=end))
    return Index(out, entries, index.class_names, limits=index.limits, notes=index.notes)


class _Run:
    """One run over all videos.

    Attributes:
      frames: number of frames in the copies made so far.
      seconds: duration.
    """

    def __init__(self, out: str, jobs: Sequence[Job], short_side: int, unfinished: str):
        self._out, self._short_side, self._unfinished = out, short_side, unfinished
        with ThreadPoolExecutor(_THREADS) as pool:
            self._jobs = list(pool.map(self._look_up, jobs))
        self._read = self._written = self._copies = 0  # bytes of originals and of copies; number of copies
        self._pending = sum(job.size for job in self._jobs)  # bytes of originals
        self._outdated = sum(job.outdated for job in self._jobs)
        self.frames, self.seconds = 0, 0.0

    def _look_up(self, job: Job) -> Job:
        """Add the size of the original, and the record of its copy if that is up to date."""
        try:
            size, status = file_size(job.path), os.stat(job.path)
        except (DecodeError, OSError):  # copying reports it
            return job
        record = read_record(job.copy)
        if record and record.is_of(status, self._short_side):
            return job._replace(size=size, kept=record)
        outdated = os.path.getsize(job.copy) if os.path.exists(job.copy) else 0
        return job._replace(size=size, outdated=outdated)

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
            bar = tqdm(todo, unit="file", file=sys.stderr, desc="transcoding", disable=not todo)
            with bar, contextlib.closing(self._results(todo, workers)) as results:
                self._check_space()
                for number, outcome in zip(bar, results, strict=True):
                    outcomes[number] = outcome
                    self._report(self._jobs[number], outcome, bar)
                    self.seconds = time.monotonic() - started
                    bar.set_postfix_str(f"{self.frames / self.seconds:,.0f} frames/s", refresh=False)
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
        jobs = {number: self._jobs[number] for number in numbers}
        short_side, unfinished = self._short_side, self._unfinished

        def process(number: int, note: Note) -> Outcome:
            return _process(jobs[number], short_side, os.path.join(unfinished, f"{number}.mp4"))

        return in_processes(
            process, numbers, workers, ahead=_AHEAD, on_death=lambda worker: _KILLED, setup=configure_decoding
        )

    def _count(self, job: Job, *, copied: bool) -> None:
        self._pending -= job.size
        self._outdated -= job.outdated
        self._read += job.size
        if copied:
            self._copies += 1
            self._written += os.path.getsize(job.copy)

    def _needed(self) -> float:
        """Return the estimated number of bytes that the remaining copies need."""
        total = _MARGIN * self._pending * self._written / max(self._read, 1)
        return max(total - self._outdated, 0)

    def _check_space(self) -> None:
        if self._copies >= _FIRST and self._needed() > shutil.disk_usage(self._out).free:
            raise self._full_disk()

    def _full_disk(self) -> UserError:
        needed, free = _size_text(self._needed()), _size_text(shutil.disk_usage(self._out).free)
        problem = f"the remaining copies need about {needed}, but {free} is free"
        if not self._copies:
            problem = f"no copy fits: {free} is free, and the originals have {_size_text(self._pending)}"
        return UserError(
            f"{self._out}: {problem}. Free some space and re-run the command, which keeps complete copies; or"
            " choose another --out"
        )


def _process(job: Job, short_side: int, unfinished: str) -> Outcome:
    """Make the copy of a video unless there is one; `unfinished` is the file to write to."""
    try:
        if os.path.isdir(job.path):
            return Outcome(reason="folders of frames")
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
        if min(psnr) < _LOW_PSNR:
            lines.append(f"lowest PSNR: {printable(copied[int(np.argmin(psnr))][0].path)}")
    reasons = collections.Counter(
        "damaged or unreadable (see above)" if outcome.is_problem else outcome.reason
        for _, outcome in outcomes
        if not outcome.record
    )
    if images:
        reasons["images"] = images
    if reasons:
        listed = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
        lines.append(f"not copied, so that the lists have the originals: {listed}")
    return "\n".join(lines)
