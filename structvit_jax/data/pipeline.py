"""Batches as a pure function of (seed, step), read ahead in threads or processes.

`structvit_jax.data.types` defines `Batch`, and `Shard`: the rows of a batch that one process reads.
"""

from __future__ import annotations

import collections
import functools
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, cast

import numpy as np

from structvit_jax.data.media import configure_decoding
from structvit_jax.data.reader import Reader
from structvit_jax.data.stages import Stages
from structvit_jax.data.types import WHOLE, Arrays, Batch, DataOptions, Problem, Shard
from structvit_jax.data.workers import DeadWorker, Note, in_processes
from structvit_jax.utils.cores import available_cores
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

_AHEAD = 2  # number of batches to read ahead: per worker process, or in total without workers
THREADS = 2  # that read if there are no worker processes
# Largest automatic number of worker processes. Each holds up to _AHEAD batches, 0.6 GB in the recipes for
# videos, and 20 processes keep up with a large GPU.
_MAX_WORKERS = 32
# Rows of a batch, the number of the example that fills them, and the function that reads it. It is given the
# inputs of these rows, and may write to them instead of returning new arrays.
_Job = tuple[slice, int, Callable[[np.ndarray], dict[str, Any]]]


def train_batches(
    reader: Reader, batch_size: int, *, start_step: int, shard: Shard = WHOLE
) -> Generator[Batch]:
    """Yield shuffled batches forever, from step `start_step` on.

    Every epoch visits each example once, in a new random order. The copies of an example in repeated
    augmentation are adjacent.
    """
    read = functools.partial(_train_batch, reader, batch_size, shard)
    return _prefetched(reader, read, range(start_step, sys.maxsize))


def test_batches(reader: Reader, batch_size: int, *, shard: Shard = WHOLE) -> Generator[Batch]:
    """Yield all views of every example once, in order; the last batch is padded with masked rows."""
    shape, dtype = reader.arrays["inputs"]
    arrays = {"inputs": ((reader.views, *shape), dtype), "labels": reader.arrays["labels"]}
    return _in_order(reader, reader.test, arrays, batch_size, 0, shard)


def uncropped_batches(reader: Reader, batch_size: int, *, start: int) -> Generator[Batch]:
    """Yield every image once, uncropped, in order, from batch `start` on; the last batch is padded."""
    arrays = {key: reader.arrays[key] for key in ("inputs", "labels")}
    return _in_order(reader, reader.resized, arrays, batch_size, start, WHOLE)


def _in_order(
    reader: Reader,
    read: Callable[[int], dict[str, Any]],
    arrays: Arrays,
    batch_size: int,
    start: int,
    shard: Shard,
) -> Generator[Batch]:
    examples = len(reader.source)

    def read_batch(number: int, note: Note) -> Batch:
        rows = _rows(number, batch_size, shard)
        jobs = (
            (slice(row, row + 1), index, lambda inputs, index=index: read(index))
            for row, index in enumerate(rows)
            if index < examples
        )
        return _fill(reader, arrays, len(rows), jobs, note)

    return _prefetched(reader, read_batch, range(start, -(-examples // batch_size)))


def _train_batch(reader: Reader, batch_size: int, shard: Shard, step: int, note: Note) -> Batch:
    rows = _rows(step, batch_size, shard)
    return _fill(reader, reader.arrays, len(rows), _train_jobs(reader, rows), note)


def _train_jobs(reader: Reader, rows: range) -> Iterator[_Job]:
    repeats, examples = reader.augment.repeated_augmentation, len(reader.source)
    for visit, group in itertools.groupby(rows, lambda row: row // repeats):
        same = list(group)  # the rows of this shard that are copies of one example
        epoch, rank = divmod(visit, examples)
        index = int(_order(reader.seed, epoch, examples)[rank])
        copies = range(same[0] % repeats, same[-1] % repeats + 1)
        first = same[0] - rows[0]
        read = functools.partial(reader.train, epoch, index, copies)
        yield slice(first, first + len(copies)), index, read


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(examples)


def _rows(batch: int, batch_size: int, shard: Shard) -> range:
    """Return the positions of a shard's rows, counted over all batches."""
    host, hosts = shard
    if batch_size % hosts:
        raise UserError(f"a batch of {batch_size} is not divisible by {hosts} processes")
    size = batch_size // hosts
    start = batch * batch_size + host * size
    return range(start, start + size)


def _fill(reader: Reader, arrays: Arrays, rows: int, jobs: Iterable[_Job], note: Note) -> Batch:
    """Read examples into the rows of a batch; rows without a readable example stay masked."""
    problems: list[Problem] = []
    with Stages() as stages:
        batch = {key: np.zeros((rows, *shape), dtype) for key, (shape, dtype) in arrays.items()}
        batch |= {"mask": np.zeros(rows, bool), "index": np.full(rows, -1, np.int32)}
        for target, index, read in jobs:
            batch["index"][target] = index
            note(str(index))
            inputs = batch["inputs"][target]
            try:
                example = read(inputs)
            except DecodeError as error:
                problems.append(Problem(reader.source.id(index), str(error)))
                continue
            for kind, reason in example.pop("notes").items():
                problems.append(Problem(reader.source.id(index), reason, kind))
            for key, value in example.items():
                if value is not inputs:
                    batch[key][target] = value
            batch["mask"][target] = True
    return cast(Batch, {**batch, "problems": tuple(problems), "seconds": stages.seconds})


def worker_count(data: DataOptions, batches: int = sys.maxsize) -> int:
    """Return how many processes read this number of batches; 0 stands for two threads.

    If config.data.workers is -1, files are read by one process per CPU core that this process may use, up to
    `_MAX_WORKERS`. Threads read what processes would not read faster: generated data, and one or two batches.
    """
    if data.workers >= 0:
        return data.workers
    in_files = data.name == "folder" or data.name.startswith("tfds:")
    if not in_files or batches <= THREADS:
        return 0
    return min(available_cores(), batches, _MAX_WORKERS)


def _prefetched(reader: Reader, read: Callable[[int, Note], Batch], numbers: range) -> Generator[Batch]:
    """Yield batches by number, read ahead in worker processes or threads, see `worker_count`.

    Raises:
      UserError: a worker died; the message names the example that it was reading.
    """
    if not (workers := worker_count(reader.data, len(numbers))):
        return _in_threads(read, numbers)
    on_death = functools.partial(_raise_worker_death, reader)
    return in_processes(
        read,
        numbers,
        workers,
        ahead=_AHEAD,
        on_death=on_death,
        setup=configure_decoding,
        descriptors=[reader.cached.cache.descriptor] if reader.cached else [],
    )


def _in_threads(read: Callable[[int, Note], Batch], numbers: range) -> Generator[Batch]:
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
    pending: collections.deque[Future[Batch]] = collections.deque()
    try:
        for number in numbers:
            pending.append(pool.submit(read, number, lambda text: None))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _raise_worker_death(reader: Reader, worker: DeadWorker) -> NoReturn:
    example = reader.source.id(int(worker.note)) if worker.note else "its first example"
    raise UserError(
        f"a data worker (pid {worker.pid}) died with exit code {worker.code} while reading"
        f" {example}. If memory ran out, use fewer --config.data.workers; re-run"
        " the command to resume"
    )
