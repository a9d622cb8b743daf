"""Handle SIGTERM, SIGINT and SIGHUP during training.

As long as a command has nothing to save, a signal ends it at once with exit code 75; files are written
atomically, so nothing is lost. From the first step on, a signal is only recorded: the run saves and stops
after the current step. A second Ctrl-C ends it at once with exit code 130.

In a command, a separate thread acts on the signals. Python calls signal handlers in the main thread, which
may be busy compiling for minutes. This module imports the standard library only, because commands start to
listen before slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from structvit_jax.utils.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A second SIGINT within this time (in seconds) belongs to the same Ctrl-C: the terminal sends one to the
# process, and a launcher may pass on another.
_SAME_CTRL_C = 0.2


class SignalListener:
    """Receive the signals that ask a run to stop. There is one instance, `LISTENER`."""

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}  # handlers to restore
        self._ends_process = self._deferring = self._forwarding = False
        self._first: float | None = None  # time of the first signal
        self._cleanups: list[Callable[[], None]] = []

    @property
    def running(self) -> bool:
        """Whether this object receives the signals, between `start` and `stop`."""
        return bool(self._old)

    @property
    def noticed(self) -> bool:
        """Whether a signal has asked to stop."""
        return self._first is not None

    def start(self, *, ends_process: bool) -> None:
        """Start to receive the signals. Call it in the main thread.

        Args:
          ends_process: whether a signal may end the process, which is so in a command. Otherwise the first
            signal is only recorded, and a second Ctrl-C raises KeyboardInterrupt.
        """
        if self.running:
            return
        self._ends_process, self._deferring = ends_process, not ends_process
        self._first, self._forwarding = None, False
        if ends_process:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
            self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                self._old[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        """Restore the previous handlers. Call it in the main thread."""
        if not self.running:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
        if self._ends_process:
            signal.set_wakeup_fd(self._old_writer)
            os.close(self._writer)  # this ends the thread

    def defer(self, *, forward: bool = False) -> None:
        """From now on, only record signals, because there is something to save.

        Args:
          forward: also turn SIGINT and SIGHUP into SIGTERM, which JAX passes on to the other processes of
            the run.
        """
        self._deferring = True
        self._forwarding = self._forwarding or forward

    @contextlib.contextmanager
    def cleanup(self, function: Callable[[], None]) -> Iterator[None]:
        """Within this context, call `function` if a signal ends the process, from the listening thread."""
        self._cleanups.append(function)
        try:
            yield
        finally:
            self._cleanups.remove(function)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread, unless there is a listening thread, which then does it."""
        if not self._ends_process:
            self._receive(number)

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in _SIGNALS:
                    self._receive(number[0])

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if not self._deferring:
                line = "stopped by a signal with nothing to save; re-run the command to resume"
                self._exit(EXIT_RESUMABLE, line)
            if self._forwarding and number != signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGINT and now - self._first > _SAME_CTRL_C:
            if not self._ends_process:
                raise KeyboardInterrupt
            line = "interrupted; re-run the command to resume from the last checkpoint"
            self._exit(EXIT_INTERRUPTED, line)

    def _exit(self, code: int, line: str) -> NoReturn:
        for function in self._cleanups:
            with contextlib.suppress(Exception):
                function()
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        os._exit(code)


LISTENER = SignalListener()
