"""Speed of a training run: the remaining time, and advice when steps wait for data."""

from __future__ import annotations

import math

_HALF_LIFE = 60.0  # seconds after which a measurement counts half
_SETTLED_STEPS, _SETTLED_SECONDS = 50, 60.0  # either is enough to judge the data wait
_HIGH_DATA_WAIT = 0.3  # of the time in steps


class Progress:
    """A moving average over the time in steps, weighted by duration: short intervals count little.

    Compilation, evaluations and saves are not part of it.
    """

    def __init__(self, workers: int, cores: int):
        """Args: `workers`, config.data.workers; `cores`, those available to this process."""
        self._workers, self._cores = workers, cores
        self._steps = self._seconds = self._waited = 0.0
        self._all_steps, self._all_seconds = 0, 0.0
        self._advised = False

    def add(self, steps: int, seconds: float, waited: float) -> None:
        """Record an interval: steps taken, its length, and the seconds in it spent waiting for data."""
        keep = 0.5 ** (seconds / _HALF_LIFE)
        self._steps = keep * self._steps + steps
        self._seconds = keep * self._seconds + seconds
        self._waited = keep * self._waited + waited
        self._all_steps, self._all_seconds = self._all_steps + steps, self._all_seconds + seconds

    def remaining(self, steps: int) -> float:
        """Seconds that `steps` more steps are expected to take."""
        return steps * self._seconds / self._steps

    def advice(self) -> str | None:
        """One line on what to change if steps wait for data; at most once, when the average has settled."""
        settled = self._all_steps >= _SETTLED_STEPS or self._all_seconds >= _SETTLED_SECONDS
        fraction = self._waited / self._seconds if self._seconds else 0.0
        if self._advised or not settled or fraction <= _HIGH_DATA_WAIT:
            return None
        self._advised = True
        # As many workers as keep up with the steps, if reading scales.
        wanted = math.ceil(max(self._workers, 1) / max(1 - fraction, 1e-6))
        workers, cores = min(wanted, self._cores), _cores(self._cores)
        problem = f"note: {fraction:.0%} of the time in steps is spent waiting for data"
        if workers > max(self._workers, 1):
            return f"{problem}; try --config.data.workers={workers} (now {self._workers}, {cores} available)"
        return (
            f"{problem}, and config.data.workers={self._workers} already uses the {cores} available; store"
            " smaller images or clips, augment less, or use a machine with more cores"
        )


def _cores(count: int) -> str:
    return f"{count} CPU core{'s' * (count > 1)}"
