"""Watch the other processes of a run. If one fails or vanishes, the others report which one and end as well.

Without this, they would wait for it in a collective operation.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from structvit_jax.runtime import processes
from structvit_jax.utils.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE, Stopped, UserError

# Keys in JAX's key-value store, each followed by the number of a process.
_NAME, _FAILED, _ALIVE = (f"structvit_jax/{what}/" for what in ("name", "failed", "alive"))
_DONE = "done"  # the last heartbeat of a process that has finished
_GRACE = 3.0  # seconds in which the other processes read why one has failed


@contextlib.contextmanager
def fail_together(heartbeat: int) -> Iterator[None]:
    """Report a failure of this process to the others of its run, and end this process if another fails.

    Enter it after `processes.join`. With one process it does nothing.

    Args:
      heartbeat: seconds without a heartbeat after which a process counts as dead.
    """
    if not processes.is_multiprocess():
        yield
        return
    watch, stopped = _Watch(heartbeat), None
    try:
        try:
            yield
        except Stopped as stop:
            stopped = stop
        processes.barrier()  # wait until all have finished
    except BaseException as error:
        watch.end(error)
    watch.close()
    # All processes shut down together, because JAX aborts those that outlive the first one.
    jax.distributed.shutdown()
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    if stopped:
        raise stopped


class _Watch:
    """Threads that send the heartbeat of this process and check the heartbeats of the others."""

    def __init__(self, heartbeat: int):
        state = processes.distributed()
        self._store: Any = state.client  # JAX's key-value store, which process 0 holds
        self._timeout, self._interval = heartbeat, min(1.0, heartbeat / 10)
        self._me, self._count = state.process_id, state.num_processes
        name = f"process {self._me} of {self._count} (host {socket.gethostname()}, pid {os.getpid()})"
        self._store.key_value_set(f"{_NAME}{self._me}", name)
        try:
            wait = 1000 * processes.JOIN_TIMEOUT
            keys = [f"{_NAME}{i}" for i in range(self._count)]
            self._names = [self._store.blocking_key_value_get(key, wait) for key in keys]
        except jax.errors.JaxRuntimeError:
            processes.give_up(f"{processes.JOIN_TIMEOUT} s")
        others = set(range(self._count)) - {self._me}
        # The last heartbeat of each other process, and when it arrived. Before the first one, time counts
        # from now.
        self._seen = {f"{_ALIVE}{i}": ("", time.monotonic()) for i in others}
        self._replies = 0  # number of replies from the store
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if self._me:
            threading.Thread(target=self._watch_store, daemon=True).start()
            self._address = state.coordinator_address
            # When process 0 is gone, JAX raises SIGABRT; it offers no other hook. Python's signal handlers
            # would run too late, so a C handler is set.
            self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)

    def close(self) -> None:
        """Stop watching, after all processes have finished."""
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_ALIVE}{self._me}", _DONE, allow_overwrite=True)

    def end(self, error: BaseException) -> NoReturn:
        """End this process after an error, which the failure of another process may have caused."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            print("checking whether another process has failed", file=sys.stderr)
            self._thread.join(timeout=self._timeout + _GRACE)
        self._closing.set()
        code, text = 1, " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            code, text = EXIT_INTERRUPTED, "interrupted"
        elif isinstance(error, UserError):
            code = error.exit_code
        else:
            sys.excepthook(type(error), error, error.__traceback__)
            text = f"{type(error).__name__}: {text[:300]}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_FAILED}{self._me}", json.dumps([text, code]))
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._exit(code)

    def _run(self) -> None:
        beat = 0
        while not self._closing.wait(self._interval):
            beat += 1
            try:
                self._store.key_value_set(f"{_ALIVE}{self._me}", str(beat), allow_overwrite=True)
                failures = self._store.key_value_dir_get(_FAILED)
                heartbeats = self._store.key_value_dir_get(_ALIVE)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone or ending; JAX then aborts this process
            self._replies += 1
            for key, value in failures:
                if key != f"{_FAILED}{self._me}":
                    text, code = json.loads(value)
                    self._exit_because(f"{self._names[int(key.removeprefix(_FAILED))]} failed: {text}", code)
            self._check(heartbeats)

    def _check(self, heartbeats: list[tuple[str, str]]) -> None:
        """End this process if the last heartbeat of another process is too old."""
        now = time.monotonic()
        for key, beat in heartbeats:
            if beat == _DONE:
                self._seen.pop(key, None)
            elif key in self._seen and self._seen[key][0] != beat:
                self._seen[key] = beat, now
        for key, (_, since) in self._seen.items():
            if now - since > self._timeout:
                self._exit_lost(int(key.removeprefix(_ALIVE)))

    def _watch_store(self) -> None:
        """End this process if process 0, which holds the store, is suspended.

        In that case calls to the store hang, and JAX would abort later with a stack trace.
        """
        silent, replies = 0.0, 0
        while not self._closing.wait(self._interval):
            # Count intervals instead of reading a clock, because this process may have been suspended, too.
            silent = silent + self._interval if replies == self._replies else 0.0
            replies = self._replies
            if silent > self._timeout:
                self._exit_lost(0)

    def _aborted(self, number: int) -> None:
        """Handle SIGABRT: report that process 0 is gone, if it cannot be reached."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._exit_because(f"{self._names[0]} is gone", EXIT_RESUMABLE)
        faulthandler.dump_traceback()  # aborted for another reason; the process ends after this handler

    def _exit_lost(self, number: int) -> NoReturn:
        name = self._names[number]
        self._exit_because(
            f"no heartbeat from {name} for {self._timeout} s; assuming it is dead", EXIT_RESUMABLE
        )

    def _exit_because(self, reason: str, code: int) -> NoReturn:
        advice = "; re-run the command to resume" if code == EXIT_RESUMABLE else ""
        me = f"process {self._me} of {self._count}"
        print(f"error: {reason}; {me} ends as well{advice}", file=sys.stderr, flush=True)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """End the process without Python's cleanup, which would wait for the others."""
        if self._me == 0:  # the store ends with process 0
            time.sleep(_GRACE)
        os._exit(code)
