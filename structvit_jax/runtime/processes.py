"""The processes of one run: join, synchronise, exchange objects, and stop after the same step.

JAX connects them and moves arrays between them. The primary process alone writes files and prints.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from structvit_jax.runtime import signals
from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError
from structvit_jax.utils.failures import printable

T = TypeVar("T")
JOIN_TIMEOUT = 300  # seconds within which all processes must have started
_BARRIER_TIMEOUT = 7 * 24 * 3600  # seconds; so long because the heartbeat already finds dead processes
_barriers = itertools.count()  # numbers of barriers, which need distinct names


def join(heartbeat: int, stoppable: bool) -> None:
    """Connect the processes of this run, if there are several. Call it before JAX opens a device.

    On SLURM and TPU pods, JAX finds the processes. Elsewhere, each process needs the environment variables
    JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      heartbeat: seconds without a heartbeat after which a process counts as dead.
      stoppable: whether a `StopSignal` handles SIGTERM; otherwise SIGTERM ends the process.

    Raises:
      UserError: the variables are incomplete or invalid, or the processes cannot connect.
    """
    jax.config.update("jax_enable_preemption_service", stoppable)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and len(given) < len(names):
        raise UserError(f"{' and '.join(given)} given without {' and '.join(set(names) - set(given))}")
    # Longer than the limits of this package, because JAX aborts with a stack trace when its own are reached.
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": 2 * heartbeat + 20,
        "initialization_timeout": 2 * JOIN_TIMEOUT,
    }
    if given:
        address, count, number = (os.environ[name] for name in names)
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise UserError(
                f"JAX_PROCESS_ID={number} must be a number from 0 to JAX_NUM_PROCESSES - 1"
                f" (JAX_NUM_PROCESSES={count})"
            )
        options |= {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    at_address = f" at {options['coordinator_address']}" if given else ""
    late = threading.Timer(JOIN_TIMEOUT, give_up, [f"{JOIN_TIMEOUT} s{at_address}"])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        # "coordinator_address should be defined": JAX has found no cluster, so there is one process.
        if given or "should be defined" not in str(error):
            raise UserError(f"the processes of the run cannot connect: {error}") from error
    finally:
        late.cancel()
    if is_multiprocess() and stoppable:
        signals.LISTENER.defer(forward=True)


def give_up(waited: str) -> NoReturn:
    """End this process because others have not connected.

    Args:
      waited: how long it has waited, and at which address, for the message.
    """
    line = (
        f"error: not all processes of the run have connected within {waited}: check that each was started and"
        " can reach process 0; re-run the command to try again"
    )
    print(line, file=sys.stderr, flush=True)
    os._exit(EXIT_RESUMABLE)


def is_primary() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def log(line: str) -> None:
    """Print a line in the primary process."""
    if is_primary():
        print(printable(line), flush=True)


def process_shard() -> tuple[int, int]:
    """Return the index of this process and the number of processes, which select its part of every batch."""
    return jax.process_index(), jax.process_count()


def is_multiprocess() -> bool:
    """Return whether the run has more than one process, without opening a device."""
    return (distributed().num_processes or 1) > 1


def barrier() -> None:
    """Wait until all processes call this. (On CPUs, a collective operation would give up after 30 s.)"""
    if is_multiprocess():
        name = f"structvit_jax/barrier/{next(_barriers)}"
        distributed().client.wait_at_barrier(name, timeout_in_ms=1000 * _BARRIER_TIMEOUT)


def allgather_object(value: T) -> list[T]:
    """Return the values of all processes. Every process must call this, and gets the same list."""
    if not is_multiprocess():
        return [value]
    barrier()
    raw = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - len(raw))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def processes_on_these_cores() -> int:
    """Return how many processes of the run may use the same cores of the same host as this one.

    Every process must call this.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    own = (socket.gethostname(), cores)
    return allgather_object(own).count(own)


def broadcast_from_primary(function: Callable[[], T]) -> T:
    """Call `function` in the primary process, and return its result in all. Every process must call this."""
    return cast(T, allgather_object(function() if is_primary() else None)[0])


class StopSignal:
    """Record whether a signal has asked the run to stop.

    The signal is SIGTERM (preemption, a time limit), Ctrl-C or SIGHUP. With several processes, a signal to
    one of them is enough: JAX receives SIGTERM and passes it on. In a command, a signal that arrives before
    the first call of `before` ends the process; see `structvit_jax.runtime.signals`.
    """

    def __init__(self) -> None:
        self._asked, self._started = 0, False

    def __enter__(self) -> StopSignal:
        if not signals.LISTENER.running:
            signals.LISTENER.start(ends_process=False)
            self._started = True
        if is_multiprocess():
            signals.LISTENER.defer(forward=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            signals.LISTENER.stop()

    def before(self, step: int) -> bool:
        """Return whether to stop before a step. All processes get the same answer.

        All processes must ask JAX about the same steps in the same order. After a signal, JAX answers yes for
        only one step: the first that no process had asked about. So a resumed run also asks about all earlier
        steps.
        """
        signals.LISTENER.defer()
        if not is_multiprocess():
            return signals.LISTENER.noticed
        first, self._asked = self._asked + 1, step
        return any(multihost_utils.reached_preemption_sync_point(i) for i in range(first, step + 1))


def distributed() -> Any:
    """Return the internal state of jax.distributed: JAX has no public barriers and key-value store."""
    from jax._src import distributed

    return distributed.global_state
