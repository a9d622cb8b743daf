"""Batches as a pure function of (seed, step), read ahead by grain in threads or processes.

A batch is a dict of arrays over its rows, and of what could not be read:

    inputs    uint8 [rows, [time,] height, width, 3] in training, [rows, views, ...] in testing
    labels    int32 [rows]
    mask      bool  [rows], False for padding and for examples that cannot be read; they count nowhere
    index     int32 [rows], the example's place in its source, -1 for padding
    problems  tuple of Problem: what could not be read, and notes on what could

and with label maps, in training: `map_classes` and `map_scores` of the whole image, [rows, height, width, k],
and `pose` [rows, 2, 3], which takes a point of the crop to the image's, see `structvit_jax.data.augment`.
Several hosts read equal shares of a batch: host h of n has the h-th n-th of its rows.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from absl import flags

from structvit_jax.data.reader import Arrays, Reader
from structvit_jax.errors import DecodeError, UserError

Batch = dict[str, Any]


class Problem(NamedTuple):
    """An example that could not be read, or a note on one that could."""

    id: str
    reason: str
    # "repaired": some frames were replaced by their neighbours; "short": fewer frames than a clip has.
    kind: Literal["unreadable", "repaired", "short"] = "unreadable"

    @property
    def left_out(self) -> bool:
        return self.kind == "unreadable"


class Share(NamedTuple):
    """Which part of every batch to read."""

    host: int = 0
    hosts: int = 1

    def rows(self, batch: int, batch_size: int) -> range:
        """Positions of this host's rows, counted over all batches."""
        if batch_size % self.hosts:
            raise UserError(f"{self.hosts} processes cannot share a batch of {batch_size} equally")
        size = batch_size // self.hosts
        start = batch * batch_size + self.host * size
        return range(start, start + size)


WHOLE = Share()


def train_batches(
    reader: Reader, batch_size: int, *, repeats: int, start_step: int, share: Share, workers: int
) -> Iterator[Batch]:
    """Endless shuffled batches from step `start_step` on.

    An epoch has every example once, in an order of its own, `repeats` copies of each in a row. Since each
    batch is a function of its step, starting at a step resumes exactly, without saved state.
    """
    read = functools.partial(_train_batch, reader, batch_size, repeats, share)
    return _prefetched(read, start_step, sys.maxsize, workers)


def test_batches(reader: Reader, batch_size: int, *, share: Share, workers: int) -> Iterator[Batch]:
    """All views of every example once, in order; the last batch is padded with masked rows."""
    shape, dtype = reader.arrays["inputs"]
    arrays = {"inputs": ((reader.views, *shape), dtype), "labels": reader.arrays["labels"]}
    return _in_order(reader, reader.test, arrays, batch_size, 0, share, workers)


def whole_batches(reader: Reader, batch_size: int, *, start: int, workers: int) -> Iterator[Batch]:
    """Every image once and whole, in order, from batch `start` on; the last batch is padded."""
    arrays = {key: reader.arrays[key] for key in ("inputs", "labels")}
    return _in_order(reader, reader.whole, arrays, batch_size, start, WHOLE, workers)


def _in_order(reader, read, arrays, batch_size, start, share, workers):
    make = functools.partial(_ordered_batch, reader, read, arrays, batch_size, share)
    return _prefetched(make, start, -(-len(reader.source) // batch_size), workers)


def _train_batch(reader: Reader, batch_size: int, repeats: int, share: Share, step: int, note: Note) -> Batch:
    rows, examples = share.rows(step, batch_size), len(reader.source)
    batch = _empty(len(rows), reader.arrays)
    for place, group in itertools.groupby(rows, lambda position: position // repeats):
        positions = list(group)
        epoch, rank = divmod(place, examples)
        index = int(_order(reader.seed, epoch, examples)[rank])
        copies = range(positions[0] % repeats, positions[-1] % repeats + 1)
        first = positions[0] - rows[0]
        read = functools.partial(reader.train, epoch, index, copies)
        _fill(batch, slice(first, first + len(copies)), index, reader, read, note)
    return batch


def _ordered_batch(
    reader: Reader,
    read: Callable[[int], dict[str, Any]],
    arrays: Arrays,
    batch_size: int,
    share: Share,
    number: int,
    note: Note,
) -> Batch:
    rows = share.rows(number, batch_size)
    batch = _empty(len(rows), arrays)
    for row, index in enumerate(rows):
        if index < len(reader.source):
            _fill(batch, slice(row, row + 1), index, reader, functools.partial(read, index), note)
    return batch


def _empty(rows: int, arrays: Arrays) -> Batch:
    return {
        **{key: np.zeros((rows, *shape), dtype) for key, (shape, dtype) in arrays.items()},
        "mask": np.zeros(rows, bool),
        "index": np.full(rows, -1, np.int32),
        "problems": (),
    }


def _fill(batch: Batch, rows: slice, index: int, reader: Reader, read: Callable[[], Any], note: Note) -> None:
    """Read one example into its rows."""
    batch["index"][rows] = index
    identity = reader.source.id(index)
    note(identity)
    try:
        example = read()
        for kind, reason in example.pop("notes", {}).items():
            batch["problems"] += (Problem(identity, reason, kind),)
        for key, value in example.items():
            batch[key][rows] = value
        batch["mask"][rows] = True
    except DecodeError as error:
        batch["problems"] += (Problem(identity, str(error)),)


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(examples)


Note = Callable[[str], None]


class _Noted:
    """Reads a batch, and notes in a file of this process's own what is being read, in case it dies."""

    def __init__(self, read: Callable[..., Batch], folder: str | None):
        self._read, self._folder = read, folder
        self._file: int | None = None

    def __call__(self, number: int) -> Batch:
        return self._read(number, self._note)

    def _note(self, identity: str) -> None:
        if self._folder is None:
            return
        if self._file is None:
            self._file = os.open(os.path.join(self._folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT)
        os.pwrite(self._file, os.fsencode(identity).ljust(_NOTE)[:_NOTE], 0)  # whole at any moment


_NOTE = 512


def _prefetched(read: Callable[..., Batch], start: int, stop: int, workers: int) -> Iterator[Batch]:
    """Batches start to stop, read ahead; the order does not depend on the number of workers.

    Raises:
      UserError: a worker was killed; names what it was reading.
    """
    notes = tempfile.mkdtemp(prefix="structvit_jax_workers_") if workers else None
    data = grain.MapDataset.range(start, stop).map(_Noted(read, notes))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own; there are none outside a command
            flags.FLAGS.mark_as_parsed()
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        iterator = iter(data.to_iter_dataset(ahead).mp_prefetch(options))
    else:
        iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
    try:
        yield from iterator
    except RuntimeError as error:
        if notes is None or "terminated unexpectedly" not in str(error):
            raise
        raise UserError(_obituary(notes, str(error))) from error
    finally:
        iterator.close()
        if notes:
            shutil.rmtree(notes, ignore_errors=True)
            del iterator, data
            gc.collect()  # their shared memory hangs in cycles, and Python would complain of it at exit


def _obituary(notes: str, message: str) -> str:
    """Which of the workers that left notes are gone, and what they were reading."""
    code = next((word.rstrip(".") for word in message.split() if word.rstrip(".").lstrip("-").isdigit()), "?")
    dead = []
    for pid in os.listdir(notes):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            with open(os.path.join(notes, pid), "rb") as file:
                dead.append(f"pid {pid}, reading {os.fsdecode(file.read().strip())}")
    return (
        f"a decode worker died with exit code {code}: {'; '.join(dead) or 'before it read anything'}."
        " If memory ran out, use fewer --config.data.workers; the same command resumes"
    )
