"""Measure how long the devices of a run have had nothing to compute.

The host dispatches steps ahead of the devices. While it waits for the next batch, the devices may still
compute earlier steps; only the rest of the wait is lost.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any

import jax


class DeviceClock:
    """Record when the devices finish the steps that have been dispatched to them, in a thread."""

    def __init__(self) -> None:
        self._dispatched, self._finished = 0, (0, 0.0)  # number of steps; and of finished ones, and when
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._wait_for_results, name="device-clock", daemon=True).start()

    def dispatched(self, results: Any) -> None:
        """Note that a step was dispatched.

        Args:
          results: arrays that it computes, which no later step may reuse the memory of (see donation).
        """
        self._dispatched += 1
        self._results.put(results)

    def idle(self, since: float) -> float:
        """Return for how many seconds the devices have been idle after `since`, a time.monotonic()."""
        finished, when = self._finished
        return 0.0 if finished < self._dispatched else time.monotonic() - max(since, when)

    def close(self) -> None:
        """End the thread after the steps that have been dispatched."""
        self._results.put(None)

    def _wait_for_results(self) -> None:
        while (results := self._results.get()) is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # also raised where the results are used
                jax.block_until_ready(results)
            self._finished = self._finished[0] + 1, time.monotonic()
