"""Batches as a pure function of (seed, step), read ahead in threads or processes.

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

import collections
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from structvit_jax.data.reader import Arrays, Reader
from structvit_jax.data.workers import Lost, Note, in_processes
from structvit_jax.utils.errors import DecodeError, UserError

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


class Shard(NamedTuple):
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


WHOLE = Shard()


def train_batches(
    reader: Reader, batch_size: int, *, repeats: int, start_step: int, share: Shard, workers: int
) -> Iterator[Batch]:
    """Endless shuffled batches from step `start_step` on.

    An epoch has every example once, in an order of its own, `repeats` copies of each in a row. Since each
    batch is a function of its step, starting at a step resumes exactly, without saved state.
    """
    read = functools.partial(_train_batch, reader, batch_size, repeats, share)
    return _prefetched(read, start_step, sys.maxsize, workers)


def test_batches(reader: Reader, batch_size: int, *, share: Shard, workers: int) -> Iterator[Batch]:
    """All views of every example once, in order; the last batch is padded with masked rows."""
    shape, dtype = reader.arrays["inputs"]
    arrays = {"inputs": ((reader.views, *shape), dtype), "labels": reader.arrays["labels"]}
    return _in_order(reader, reader.test, arrays, batch_size, 0, share, workers)


def uncropped_batches(reader: Reader, batch_size: int, *, start: int, workers: int) -> Iterator[Batch]:
    """Every image once and whole, in order, from batch `start` on; the last batch is padded."""
    arrays = {key: reader.arrays[key] for key in ("inputs", "labels")}
    return _in_order(reader, reader.whole, arrays, batch_size, start, WHOLE, workers)


def _in_order(reader, read, arrays, batch_size, start, share, workers):
    make = functools.partial(_ordered_batch, reader, read, arrays, batch_size, share)
    return _prefetched(make, start, -(-len(reader.source) // batch_size), workers)


def _train_batch(reader: Reader, batch_size: int, repeats: int, share: Shard, step: int, note: Note) -> Batch:
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
    share: Shard,
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


def _prefetched(read: Callable[[int, Note], Batch], start: int, stop: int, workers: int) -> Iterator[Batch]:
    """Yield batches start to stop, read ahead; the order does not depend on the number of workers.

    Raises:
      UserError: a worker died; names what it was reading.
    """
    if workers:
        return in_processes(read, range(start, stop), workers, ahead=_AHEAD, lost=_died)
    return _in_threads(read, range(start, stop))


def _in_threads(read: Callable[[int, Note], Batch], numbers: range) -> Iterator[Batch]:
    """Yield batches that two threads read ahead."""
    pool = ThreadPoolExecutor(2, thread_name_prefix="read-ahead")
    pending: collections.deque[Future[Batch]] = collections.deque()
    try:
        for number in numbers:
            pending.append(pool.submit(read, number, lambda identity: None))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_AHEAD = 2  # batches that are read, or wait to be taken: in all, or for each worker


def _died(worker: Lost) -> NoReturn:
    raise UserError(
        f"a data worker (pid {worker.pid}) died with exit code {worker.code}, reading"
        f" {worker.note or 'nothing yet'}. If memory ran out, use fewer --config.data.workers; re-run the"
        " command to resume"
    )
