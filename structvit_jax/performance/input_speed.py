"""Time reading the data of a recipe, stage by stage and end to end: `structvit bench input`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax

from structvit_jax.data import Batch, typical
from structvit_jax.data.cached_source import open_cache
from structvit_jax.data.pipeline import train_batches
from structvit_jax.data.reader import Reader
from structvit_jax.data.workers import DeadWorker, in_processes
from structvit_jax.runtime.mesh import put_batch, single_device_mesh
from structvit_jax.utils.cores import available_cores
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.tables import align_columns

_CLIPS, _IMAGES = 4, 64  # rows of a batch that is measured
_SECONDS = 0.5  # shortest duration of a round
_MAX_UNREADABLE = 100  # give up if none of more examples can be read
_QUEUED = 3  # batches that a loader may have read ahead, per worker

Sample = dict[str, float]  # seconds per row of a batch, by stage
Rates = dict[str, list[float]]  # rows per second in each round, by name of a loader


class Reading(NamedTuple):
    """Seconds of reading some batches.

    Attributes:
      samples: one per batch. Their stages are those of `structvit_jax.data.stages`, and "transport" from a
        worker process to its parent, and "device", from host memory to the device.
      notes: examples that could not be read, with reasons.
    """

    samples: list[Sample]
    notes: list[str]


def report(name: str, reader: Reader, *, rounds: int, workers: Sequence[int], peer: str | None) -> None:
    """Print how long the stages of reading take, and how fast batches arrive.

    Args:
      name: name of the recipe.
      reader: the training split of the recipe.
      rounds: number of measurements.
      workers: numbers of worker processes with which to measure the rate of batches.
      peer: "torch" also measures PyTorch with these numbers of worker processes.

    Raises:
      UserError: no example can be read, or the peer cannot read them.
    """
    unit = "image" if reader.is_image else "clip"
    copies = reader.augment.repeated_augmentation
    rows = -(-(_IMAGES if reader.is_image else _CLIPS) // copies) * copies
    width, height, frames, _ = typical(reader.source)
    length = "" if reader.is_image else f"{frames} frames of "
    shape = "x".join(map(str, reader.shape[:-1]))
    print(f"{name}: {unit}s of {shape} from {length}{width}x{height}", flush=True)
    reading = time_stages(reader, rows, rounds)
    columns = {_count(copies, "copy", "copies"): reading.samples}
    if copies > 1:
        columns["1 copy"] = time_stages(with_options(reader, copies=1), rows, rounds).samples
    # Generated files of other recipes stand for data that would not fit in memory.
    if name == "folder" and reader.is_image and (cached := open_cache([reader.source], reader.data)[0]):
        other = with_options(reader)
        other.cached = cached[0]
        epoch = -(-len(reader.source) * copies // rows)
        columns["from the cache"] = time_stages(other, rows, rounds, start=epoch).samples
    print("\n".join(stage_table(columns, unit)))
    print(_summary(reading, unit), flush=True)
    if workers:
        rates = {count: _compare(reader, rows, rounds, count, peer) for count in workers}
        print("\n".join(rate_table(rates, unit)))
    print(flush=True)


def with_options(reader: Reader, *, workers: int = 0, copies: int | None = None) -> Reader:
    """Return a reader with another number of worker processes, or of copies in repeated augmentation."""
    other = copy.copy(reader)
    other.data = dataclasses.replace(reader.data, workers=workers)
    if copies is not None:
        other.augment = dataclasses.replace(reader.augment, repeated_augmentation=copies)
    return other


def time_stages(reader: Reader, rows: int, rounds: int, start: int = 0) -> Reading:
    """Time the stages of reading batches in one worker process, and of moving them to the device.

    Args:
      reader: the data to read.
      rows: rows of a batch.
      rounds: smallest number of batches; short ones are repeated for `_SECONDS` per round.
      start: number of batches that are read before.

    Raises:
      UserError: no example can be read.
    """
    samples, notes = list[Sample](), list[str]()
    with contextlib.closing(train_batches(with_options(reader, workers=1), rows, start_step=0)) as batches:
        for _ in range(start):
            next(batches)
        ready = next(batches)  # not timed, because the worker starts
        begin = time.perf_counter()
        while len(samples) < rounds or time.perf_counter() - begin < rounds * _SECONDS:
            batch = next(batches)
            notes += [f"{problem.id}: {problem.reason}" for problem in batch["problems"] if problem.left_out]
            if readable := int(batch["mask"].sum()):
                samples.append({stage: seconds / readable for stage, seconds in batch["seconds"].items()})
            elif not samples and len(notes) > _MAX_UNREADABLE:
                raise UserError(f"none of {len(notes)} examples could be read, such as {notes[0]}")
    for sample, seconds in zip(samples, _time_moves(ready, len(samples)), strict=True):
        sample |= {stage: second / rows for stage, second in seconds.items()}
    return Reading(samples, notes)


def _time_moves(batch: Batch, count: int) -> Iterator[dict[str, float]]:
    """Send a batch from a worker process and put it on the first device; yield the seconds, `count` times."""
    mesh = single_device_mesh()
    arriving = in_processes(
        lambda number, note: batch, range(count + 1), 1, ahead=1, on_death=_raise_worker_death
    )
    with contextlib.closing(arriving):
        jax.block_until_ready(put_batch(mesh, next(arriving)))
        for _ in range(count):
            begin = time.perf_counter()
            arrived = next(arriving)
            middle = time.perf_counter()
            jax.block_until_ready(put_batch(mesh, arrived))
            yield {"transport": middle - begin, "device": time.perf_counter() - middle}


def _raise_worker_death(worker: DeadWorker) -> NoReturn:
    raise UserError(f"a worker process (pid {worker.pid}) died with exit code {worker.code}")


def stage_table(columns: Mapping[str, Sequence[Sample]], unit: str) -> list[str]:
    """Return the lines of a table of the stages.

    Args:
      columns: samples of batches, by a label.
      unit: "clip" or "image".
    """
    stages = list(next(iter(columns.values()))[0])
    header = ["stage"]
    table = [[name] for name in [*stages, "total", f"{unit}s/s per core"]]
    for label, samples in columns.items():
        header += [f"ms per {unit} ({label})", "median", "fraction"]
        seconds = [[sample[stage] for sample in samples] for stage in stages]
        seconds.append([sum(sample.values()) for sample in samples])
        means, medians = (
            [average(row) for row in seconds] for average in (statistics.mean, statistics.median)
        )
        for row, mean, median in zip(table, means, medians, strict=False):
            row += [f"{1000 * mean:.3f}", f"{1000 * median:.3f}", f"{mean / means[-1]:.3f}"]
        table[-1] += [f"{1 / means[-1]:.1f}", f"{1 / medians[-1]:.1f}", ""]
    return align_columns([header, *table])


def _summary(reading: Reading, unit: str) -> str:
    """Return the most expensive stage, the rate of all cores, and a note on unreadable examples."""
    samples, notes = reading
    means = {stage: statistics.mean(sample[stage] for sample in samples) for stage in samples[0]}
    total = sum(means.values())
    stage = max(means, key=lambda stage: means[stage])
    cores = available_cores()
    text = (
        f"{stage} costs most ({means[stage] / total:.0%}); {_count(cores, 'core', 'cores')} can read at most"
        f" {cores / total:.0f} {unit}s/s"
    )
    return text + (f"\nnote: {len(notes)} examples could not be read, such as {notes[0]}" if notes else "")


def _compare(reader: Reader, rows: int, rounds: int, workers: int, peer: str | None) -> Rates:
    """Return the rates of batches of this package and of the variants of a peer."""
    with contextlib.ExitStack() as stack:
        own = train_batches(with_options(reader, workers=workers), rows, start_step=0)
        loaders: dict[str, Iterator[Any]] = {"structvit": stack.enter_context(contextlib.closing(own))}
        next(own)  # starts the workers
        if peer:
            from structvit_jax.performance import input_peer

            loaders |= stack.enter_context(input_peer.open_loaders(reader, rows, workers))
        return time_alternately(loaders, rows, workers, rounds)


def time_alternately(loaders: Mapping[str, Iterator[Any]], rows: int, workers: int, rounds: int) -> Rates:
    """Time loaders one after the other in each round, so that a slow phase of the machine affects all.

    Args:
      loaders: endless iterators over batches, by name; they read ahead in worker processes.
      rows: rows of a batch.
      workers: number of worker processes of each loader.
      rounds: number of measurements of each loader.
    """
    rates: Rates = {name: [] for name in loaders}
    burst = max(workers, 1)  # batches arrive in groups, one from each worker
    for _ in range(rounds):
        for name, batches in loaders.items():
            for _ in range(_QUEUED * burst):  # read while other loaders were timed
                next(batches)
            count, begin, elapsed = 0, time.perf_counter(), 0.0
            while elapsed < _SECONDS:
                for _ in range(burst):
                    next(batches)
                count += burst
                elapsed = time.perf_counter() - begin
            rates[name].append(count * rows / elapsed)
            time.sleep(_QUEUED * burst * elapsed / count)  # until the workers have read ahead and are idle
    return rates


def rate_table(by_workers: Mapping[int, Rates], unit: str) -> list[str]:
    """Return the lines of a table of median rates, and a line with spreads for each number of workers.

    A number in brackets is the rate of the first loader divided by that of a peer, the median over rounds.
    """
    columns = {_count(count, "worker", "workers"): rates for count, rates in by_workers.items()}
    cells = [_cells(rates) for rates in columns.values()]
    names = dict.fromkeys(name for column in cells for name in column)
    table = [[name, *(column.get(name, "") for column in cells)] for name in names]
    lines = align_columns([[f"{unit}s/s, end to end", *columns], *table])
    for title, rates in columns.items():
        own, *peers = rates
        line = f"{title}: {min(rates[own]):.1f} to {max(rates[own]):.1f} {unit}s/s"
        if peers:
            fastest = max(peers, key=lambda name: statistics.median(rates[name]))
            ratios = _ratios(rates, own, fastest)
            line += f", {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
            line += f" the rate of the fastest peer, {fastest}"
        lines.append(line)
    return lines


def _cells(rates: Rates) -> dict[str, str]:
    own, *peers = rates
    cells = {name: f"{statistics.median(values):.1f}" for name, values in rates.items()}
    for name in peers:
        cells[name] += f" ({statistics.median(_ratios(rates, own, name)):.2f})"
    return cells


def _ratios(rates: Rates, name: str, other: str) -> list[float]:
    return [mine / theirs for mine, theirs in zip(rates[name], rates[other], strict=True)]


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
