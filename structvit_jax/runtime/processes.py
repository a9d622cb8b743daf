"""The processes of one run: how they join and what they tell each other.

JAX starts them and carries arrays between them. Here is the rest: one process writes and speaks, all decide
alike, and a signal to one stops all after the same step.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from structvit_jax.runtime import signals
from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError, printable

JOIN_TIMEOUT = 300  # seconds in which all have to have started
_LONG = 7 * 24 * 3600  # seconds: who does not come is noticed otherwise
_meetings = itertools.count()


def join(heartbeat: int, stoppable: bool) -> None:
    """Joins the processes of this run, if there are several; call it before JAX opens a device.

    On SLURM and on TPU pods JAX finds them by itself. Elsewhere the variables JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are.

    Args:
      heartbeat: seconds without a sign of life after which a process counts as lost.
      stoppable: whether a `StopSignal` will ask for SIGTERM; it ends the process otherwise.
    """
    jax.config.update("jax_enable_preemption_service", stoppable)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and len(given) < len(names):
        raise UserError(f"{' and '.join(given)} given without {' and '.join(set(names) - set(given))}")
    options: dict[str, Any] = {  # JAX's own limits would abort with a stack trace: they come later
        "heartbeat_timeout_seconds": 2 * heartbeat + 20,
        "initialization_timeout": 2 * JOIN_TIMEOUT,
    }
    if given:
        address, count, number = (os.environ[name] for name in names)
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise UserError(f"JAX_PROCESS_ID={number} of JAX_NUM_PROCESSES={count} is none of 0 to N - 1")
        options |= {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    place = f" at {options['coordinator_address']}" if given else ""
    late = threading.Timer(JOIN_TIMEOUT, give_up, [f"{JOIN_TIMEOUT} s{place}"])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if given or "should be defined" not in str(error):
            raise UserError(f"the processes of the run do not find each other: {error}") from error
    finally:
        late.cancel()
    if is_multiprocess() and stoppable:
        signals.LISTENER.defer(forward=True)


def give_up(waited: str) -> NoReturn:
    """Ends a process that waits for others that do not come."""
    print(
        f"error: not all processes of the run have come together in {waited}: each has to be started, and to"
        " reach process 0 there; the same command tries again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_RESUMABLE)


def is_primary() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def log(line: str) -> None:
    """Print a line, in one process of a run."""
    if is_primary():
        print(printable(line), flush=True)


def process_shard() -> tuple[int, int]:
    """This process's number and how many there are: the share of every batch that it reads."""
    return jax.process_index(), jax.process_count()


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_multiprocess() -> bool:
    """Whether the run has more than one process; this opens no device."""
    return (distributed().num_processes or 1) > 1


def barrier() -> None:
    """Waits until all processes have come here. CPUs that meet in a computation give up after 30 s."""
    if is_multiprocess():
        name = f"structvit_jax/meeting/{next(_meetings)}"
        distributed().client.wait_at_barrier(name, timeout_in_ms=1000 * _LONG)


def allgather_object(value: Any) -> list[Any]:
    """Every process's value, on every process; all have to call it."""
    if not is_multiprocess():
        return [value]
    barrier()
    raw = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - len(raw))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_from_primary(choose: Callable[[], Any]) -> Any:
    """What the first process chooses, on every process; all have to call it."""
    return allgather_object(choose() if is_primary() else None)[0]


class StopSignal:
    """Whether SIGTERM (a preemption, a time limit), Ctrl-C or SIGHUP has asked the run to stop.

    Of several processes one that gets the signal is enough: JAX itself receives SIGTERM and passes it on. See
    `structvit_jax.runtime.signals` for what a signal does before the first question.
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
        """Whether to stop before a step: the same answer in all processes, which must ask in the same order.

        JAX answers yes for one number, the first that no process had asked for when the signal came. So
        a run that is resumed asks for all earlier steps too.
        """
        signals.LISTENER.defer()
        if not is_multiprocess():
            return signals.LISTENER.noticed
        first, self._asked = self._asked + 1, step
        return any(multihost_utils.reached_preemption_sync_point(i) for i in range(first, step + 1))


def distributed() -> Any:
    """The state of jax.distributed, whose barriers and key-value store have no public names."""
    from jax._src import distributed

    return distributed.global_state
