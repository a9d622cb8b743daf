"""The processes of one run: how they join, what they tell each other, and that they end together.

JAX starts them and carries arrays between them. Here is the rest: one process writes and speaks, a signal to
one stops all after the same step, and a process that fails or vanishes is named by the others, which would
otherwise wait for it inside a collective operation.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from structvit_jax.errors import MISTAKE, RESUMABLE, Stopped, UserError

_NAME, _FAILED, _ALIVE = (f"structvit_jax/{what}/" for what in ("name", "failed", "alive"))
_DONE = "done"
_GRACE = 3.0  # seconds in which the others read why a process fails, before it is gone
_JOINING = 300  # seconds in which all have to have started
_LONG = 7 * 24 * 3600  # seconds: who does not come is noticed otherwise
_meetings = itertools.count()


def join(heartbeat: int) -> None:
    """Joins the processes of this run, if there are several; call it before JAX opens a device.

    On SLURM and on TPU pods JAX finds them by itself. Elsewhere the variables JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are.

    Args:
      heartbeat: seconds without a sign of life after which a process counts as lost.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and len(given) < len(names):
        raise UserError(f"{' and '.join(given)} given without {' and '.join(set(names) - set(given))}")
    options: dict[str, Any] = {  # JAX's own limits would abort with a stack trace: they come later
        "heartbeat_timeout_seconds": 2 * heartbeat + 20,
        "initialization_timeout": 2 * _JOINING,
    }
    if given:
        address, count, number = (os.environ[name] for name in names)
        if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
            raise UserError(f"JAX_PROCESS_ID={number} of JAX_NUM_PROCESSES={count} is none of 0 to N - 1")
        options |= {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    place = f" at {options['coordinator_address']}" if given else ""
    late = threading.Timer(_JOINING, _give_up, [f"{_JOINING} s{place}"])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if given or "should be defined" not in str(error):
            raise UserError(f"the processes of the run do not find each other: {error}") from error
    finally:
        late.cancel()


def _give_up(waited: str) -> NoReturn:
    print(
        f"error: not all processes of the run have come together in {waited}: each has to be started, and to"
        " reach process 0 there",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def share() -> tuple[int, int]:
    """This process's number and how many there are: the share of every batch that it reads."""
    return jax.process_index(), jax.process_count()


def meet() -> None:
    """Waits until all processes have come here. CPUs that meet in a computation give up after 30 s."""
    if jax.process_count() > 1:
        name = f"structvit_jax/meeting/{next(_meetings)}"
        _distributed().client.wait_at_barrier(name, timeout_in_ms=1000 * _LONG)


def gather(value: Any) -> list[Any]:
    """Every process's value, on every process; all have to call it."""
    if jax.process_count() == 1:
        return [value]
    meet()
    raw = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - len(raw))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def decide(choose: Callable[[], Any]) -> Any:
    """What the first process chooses, on every process; all have to call it."""
    return gather(choose() if is_first() else None)[0]


class StopSignal:
    """Notices SIGTERM (a preemption, a time limit) and Ctrl-C; a second Ctrl-C ends at once.

    Of several processes one that gets the signal is enough: JAX passes it on.
    """

    def __init__(self) -> None:
        self._noticed = False

    def __enter__(self) -> StopSignal:
        # of several processes, JAX itself handles SIGTERM
        numbers = [signal.SIGINT] + [signal.SIGTERM] * (jax.process_count() == 1)
        self._old = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self._noticed and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noticed = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def before(self, step: int) -> bool:
        """Whether to stop before a step: the same answer in all processes, which must ask for every step."""
        if jax.process_count() == 1:
            return self._noticed
        return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def ending_together(heartbeat: int) -> Iterator[None]:
    """Tells the other processes what fails in this one, and ends this one when another fails."""
    if jax.process_count() == 1:
        yield
        return
    watch, stopped = _Watch(heartbeat), None
    try:
        try:
            yield
        except Stopped as stop:
            stopped = stop
        meet()  # all have done their work
    except BaseException as error:
        watch.end(error)
    watch.close()
    jax.distributed.shutdown()  # the others with it: none is ended by JAX because the first is gone
    if stopped:
        raise stopped


def _distributed() -> Any:
    """The state of jax.distributed, whose barriers and key-value store have no public names."""
    from jax._src import distributed

    return distributed.global_state


class _Watch:
    """A thread that shows this process's signs of life and looks for the others'."""

    def __init__(self, heartbeat: int):
        self._store: Any = _distributed().client
        self._patience = heartbeat
        self._me, self._count = share()
        name = f"process {self._me} of {self._count} (host {socket.gethostname()}, pid {os.getpid()})"
        self._store.key_value_set(f"{_NAME}{self._me}", name)
        self._names = [
            self._store.blocking_key_value_get(f"{_NAME}{i}", 1000 * _JOINING) for i in range(self._count)
        ]
        # by key: the last sign of life, and when it was new; one that never gives any is lost too
        self._seen = {f"{_ALIVE}{i}": ("", time.monotonic()) for i in range(self._count)}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if self._me:
            # JAX aborts when process 0 is gone, and has no hook for it: what is left is the signal itself
            self._address = _distributed().coordinator_address
            self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)

    def close(self) -> None:
        """Ends the watch of a process that has done its work."""
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_ALIVE}{self._me}", _DONE, allow_overwrite=True)

    def end(self, error: BaseException) -> NoReturn:
        """Ends this process for an error of its own, or for the one behind it."""
        if isinstance(error, jax.errors.JaxRuntimeError):  # perhaps a peer is gone: the watch will know
            self._thread.join(timeout=self._patience + _GRACE)
        self._closing.set()
        code = MISTAKE if isinstance(error, UserError) else 1
        text = " ".join(str(error).split())
        if code == 1:
            sys.excepthook(type(error), error, error.__traceback__)
            text = f"{type(error).__name__}: {text[:300]}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_FAILED}{self._me}", json.dumps([text, code]))
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._exit(code)

    def _run(self) -> None:
        beat, pause = 0, min(1.0, self._patience / 10)
        while not self._closing.wait(pause):
            beat += 1
            try:
                self._store.key_value_set(f"{_ALIVE}{self._me}", str(beat), allow_overwrite=True)
                failures = self._store.key_value_dir_get(_FAILED)
                signs = self._store.key_value_dir_get(_ALIVE)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone, or going: JAX ends this process
            for key, value in failures:
                if key != f"{_FAILED}{self._me}":
                    text, code = json.loads(value)
                    self._leave(f"{self._names[int(key.removeprefix(_FAILED))]} failed: {text}", code)
            for name in self._lost(signs):
                self._leave(f"{name} has given no sign of life for {self._patience} s; it is lost", RESUMABLE)

    def _aborted(self, number: int) -> None:
        """Called in place of an abort: names process 0, if it cannot be reached."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._leave(f"{self._names[0]} is gone", RESUMABLE)
        faulthandler.dump_traceback()  # another reason; returning from here ends the process

    def _lost(self, signs):
        """Names of processes that have been silent for too long."""
        now = time.monotonic()
        for key, sign in signs:
            if sign == _DONE:
                self._seen.pop(key, None)
            elif self._seen.get(key, ("", 0.0))[0] != sign:
                self._seen[key] = sign, now
        own = f"{_ALIVE}{self._me}"
        silent = [k for k, (_, since) in self._seen.items() if now - since > self._patience and k != own]
        return [self._names[int(key.removeprefix(_ALIVE))] for key in silent]

    def _leave(self, reason: str, code: int) -> NoReturn:
        advice = "; the same command resumes" if code == RESUMABLE else ""
        me = f"process {self._me} of {self._count}"
        print(f"error: {reason}; {me} ends with it{advice}", file=sys.stderr, flush=True)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """Without Python's own end, which would wait for the others."""
        if self._me == 0:  # the store goes with it
            time.sleep(_GRACE)
        os._exit(code)
