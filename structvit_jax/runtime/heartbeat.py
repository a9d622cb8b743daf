"""The watch over the other processes of a run: one that fails or vanishes is named by the others, and all
end together. Otherwise they would wait for it inside a collective operation."""

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
from structvit_jax.utils.errors import EXIT_RESUMABLE, Stopped, UserError

_NAME, _FAILED, _ALIVE = (f"structvit_jax/{what}/" for what in ("name", "failed", "alive"))
_DONE = "done"
_GRACE = 3.0  # seconds in which the others read why a process fails, before it is gone


@contextlib.contextmanager
def fail_together(heartbeat: int) -> Iterator[None]:
    """Tells the other processes of a run what fails in this one, and ends this one when another fails.

    Enter it after `processes.join`; with one process it does nothing.
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
        processes.barrier()  # all have done their work
    except BaseException as error:
        watch.end(error)
    watch.close()
    jax.distributed.shutdown()  # the others with it: none is ended by JAX because the first is gone
    if stopped:
        raise stopped


class _Watch:
    """A thread that shows this process's signs of life and looks for the others'."""

    def __init__(self, heartbeat: int):
        state = processes.distributed()
        self._store: Any = state.client
        self._patience, self._pause = heartbeat, min(1.0, heartbeat / 10)
        self._me, self._count = state.process_id, state.num_processes
        name = f"process {self._me} of {self._count} (host {socket.gethostname()}, pid {os.getpid()})"
        self._store.key_value_set(f"{_NAME}{self._me}", name)
        try:
            wait = 1000 * processes.JOIN_TIMEOUT
            keys = [f"{_NAME}{i}" for i in range(self._count)]
            self._names = [self._store.blocking_key_value_get(key, wait) for key in keys]
        except jax.errors.JaxRuntimeError:
            processes.give_up(f"{processes.JOIN_TIMEOUT} s")
        # by key: the last sign of life, and when it was new; one that never gives any is lost too
        self._seen = {f"{_ALIVE}{i}": ("", time.monotonic()) for i in range(self._count)}
        self._answers = 0  # of the store
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if self._me:
            threading.Thread(target=self._watch_store, daemon=True).start()
            # JAX aborts when process 0 is gone, and has no hook for it: what is left is the signal itself
            self._address = processes.distributed().coordinator_address
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
        if isinstance(error, jax.errors.JaxRuntimeError):
            print("perhaps another process is gone; waiting for what the watch finds", file=sys.stderr)
            self._thread.join(timeout=self._patience + _GRACE)
        self._closing.set()
        code = error.exit_code if isinstance(error, UserError) else 1
        text = " ".join(str(error).split())
        if code == 1:
            sys.excepthook(type(error), error, error.__traceback__)
            text = f"{type(error).__name__}: {text[:300]}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_FAILED}{self._me}", json.dumps([text, code]))
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._exit(code)

    def _run(self) -> None:
        beat = 0
        while not self._closing.wait(self._pause):
            beat += 1
            try:
                self._store.key_value_set(f"{_ALIVE}{self._me}", str(beat), allow_overwrite=True)
                failures = self._store.key_value_dir_get(_FAILED)
                signs = self._store.key_value_dir_get(_ALIVE)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone, or going: JAX ends this process
            self._answers += 1
            for key, value in failures:
                if key != f"{_FAILED}{self._me}":
                    text, code = json.loads(value)
                    self._leave(f"{self._names[int(key.removeprefix(_FAILED))]} failed: {text}", code)
            for name in self._lost(signs):
                self._leave_lost(name)

    def _watch_store(self) -> None:
        """End this process when process 0, which holds the store, stops answering without being gone.

        Calls to the store hang while it is stopped, and JAX aborts later, with a stack trace.
        """
        pause, silent, answers = self._pause, 0.0, 0
        while not self._closing.wait(pause):
            silent = silent + pause if answers == self._answers else 0.0  # no time in which we were stopped
            answers = self._answers
            if silent > self._patience:
                self._leave_lost(self._names[0])

    def _aborted(self, number: int) -> None:
        """Called in place of an abort: names process 0, if it cannot be reached."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._leave(f"{self._names[0]} is gone", EXIT_RESUMABLE)
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

    def _leave_lost(self, name: str) -> NoReturn:
        self._leave(f"no heartbeat from {name} for {self._patience} s; assuming it is dead", EXIT_RESUMABLE)

    def _leave(self, reason: str, code: int) -> NoReturn:
        advice = "; re-run the command to resume" if code == EXIT_RESUMABLE else ""
        me = f"process {self._me} of {self._count}"
        print(f"error: {reason}; {me} ends with it{advice}", file=sys.stderr, flush=True)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """Without Python's own end, which would wait for the others."""
        if self._me == 0:  # the store goes with it
            time.sleep(_GRACE)
        os._exit(code)
