"""Estimate how long a run takes, from a trial of its train step and from its first batch."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from structvit_jax.data.pipeline import THREADS, worker_count
from structvit_jax.data.types import Batch, DataOptions
from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import put_batch
from structvit_jax.training.learner import Learner, memory_of
from structvit_jax.training.step import TrainState
from structvit_jax.utils.cores import available_cores

_MIN_STEPS = 50  # shorter runs are not worth a trial
_MAX_REPETITIONS = 6  # of the train step in a trial


class Forecast:
    """The expected duration of a run.

    Call it before the batches are read: on a CPU, reading would slow down the trial.
    """

    def __init__(self, learner: Learner, train_step: jax.stages.Compiled, state: TrainState, steps: int):
        """Run the train step a few times on a copy of the state, unless there is no memory for a copy.

        Args:
          learner: the model, its mesh and its configuration.
          train_step: the compiled train step.
          state: the current state, which is not changed.
          steps: number of steps to go.
        """
        self._data, self._steps = DataOptions.from_config(learner.config.data), steps
        self._step_seconds: float | None = None
        if steps >= _MIN_STEPS and _fits_twice(train_step, state):
            repetitions = min(steps // _MIN_STEPS + 1, _MAX_REPETITIONS)  # 4 % of the run at most
            self._step_seconds = _trial(learner, train_step, state, repetitions)

    def describe(self, first: Batch) -> str | None:
        """Return one line with the expected duration, given the first batch; None if there was no trial."""
        if self._step_seconds is None:
            return None
        step = self._step_seconds
        readers = min(worker_count(self._data) or THREADS, available_cores())
        reading = sum(first["seconds"].values()) / readers
        shared = jax.default_backend() == "cpu"  # reading and steps take turns on the same cores
        expected = self._steps * (step + reading if shared else max(step, reading))
        return (
            f"about {_duration(expected)}: {self._steps:,} steps of {_seconds(step)} (reading a batch:"
            f" {_seconds(reading)}), without evaluations"
        )


def _fits_twice(train_step: jax.stages.Compiled, state: TrainState) -> bool:
    """Return whether every device has memory for the train step and a second state."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    needed = memory_of(train_step) + sum(
        shard.data.nbytes for array in jax.tree.leaves(state) for shard in array.addressable_shards[:1]
    )
    fits = all(limit is None or needed < 0.9 * limit for limit in limits)
    return all(processes.allgather_object(fits))


def _trial(learner: Learner, train_step: jax.stages.Compiled, state: TrainState, repetitions: int) -> float:
    """Return the median seconds of train steps on a copy of the state and an empty batch, without the first.

    All processes need the same number of repetitions, which is at least 2.
    """
    rows = learner.config.data.batch_size // processes.process_shard()[1]
    batch = {key: np.zeros((rows, *shape), dtype) for key, (shape, dtype) in learner.row.items()}
    batch |= {"mask": np.ones(rows, bool), "index": np.zeros(rows, np.int32)}
    arrays = put_batch(learner.mesh, batch)
    copy = jax.tree.map(jnp.copy, state)  # a step reuses the memory of the state that it is given
    seconds = []
    for _ in range(repetitions):
        started = time.monotonic()
        copy, _ = jax.block_until_ready(train_step(copy, arrays))
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])


def _duration(seconds: float) -> str:
    """Return a duration in its largest suitable unit, such as "25 minutes"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}s"
    return f"{seconds:.0f} seconds"


def _seconds(seconds: float) -> str:
    """Return seconds with two significant digits, such as "0.45 s"."""
    return f"{float(f'{seconds:.2g}'):g} s"
