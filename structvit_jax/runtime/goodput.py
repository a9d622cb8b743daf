"""Measure how a run spends its wall time, and the speed of its recent steps.

Goodput is the fraction of the wall time that is spent in steps. It covers all sessions of a run: each restart
begins a new session.
"""

from __future__ import annotations

import math
import time

from etils import epath

from structvit_jax.runtime.storage import read_json, write_json

FILE = "goodput.json"
# "lost" is the time of steps that were not saved before a kill, and had to be repeated.
ACTIVITIES = ("start", "restore", "compile", "input", "step", "evaluate", "save", "lost")
_MAX_SAVES = 20  # number of latest saves to record; the next session starts at one of them
_MAX_SECONDS = 1e15  # a file with a larger value is damaged
_HALF_LIFE = 60.0  # seconds of training after which the weight of a measurement halves
_SETTLED_STEPS, _SETTLED_SECONDS = 50, 60.0  # either is enough to judge the time spent waiting for data
_HIGH_DATA_WAIT = 0.3  # fraction of the time in steps


def _read(workdir: epath.Path) -> tuple[dict[str, float], dict[int, float], int]:
    """Read the file of a workdir; a missing or damaged file counts as empty.

    Returns:
      The seconds of each activity, the useful seconds (see `Goodput._useful`) before the save of each step,
      and the number of sessions.
    """
    try:
        content = read_json(workdir / FILE) or {}
        seconds = {name: float(content["seconds"].get(name, 0)) for name in ACTIVITIES}
        at_save = {int(step): float(useful) for step, useful in content["at_save"].items()}
        sessions = int(content["sessions"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}, {}, 0
    if not all(0 <= value < _MAX_SECONDS for value in (*seconds.values(), *at_save.values(), sessions)):
        return {}, {}, 0
    return seconds, at_save, sessions


def seconds_of(workdir: epath.Path) -> dict[str, float]:
    """Return the seconds that a run has spent in each activity, over all restarts; {} if unknown."""
    return _read(workdir)[0]


def wall_seconds(workdir: epath.Path) -> float:
    """Return the wall time of a run in seconds, over all restarts; 0 if unknown."""
    return sum(seconds_of(workdir).values())


class Goodput:
    """Count the seconds of each activity. One activity runs at a time; `switch` starts the next."""

    def __init__(self, workdir: epath.Path, started: float | None = None):
        """Continue the count of a workdir.

        Args:
          workdir: the workdir of the run.
          started: the time.monotonic() at which this session started; by default now.
        """
        seconds, self._at_save, sessions = _read(workdir)
        self._path, self._sessions = workdir / FILE, sessions + 1
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0) | seconds
        self._activity, self._since = "start", time.monotonic() if started is None else started

    def resume(self, step: int) -> None:
        """Count the time of the steps after `step` in earlier sessions as lost, since they are repeated."""
        useful = self._useful()
        kept = min(useful, self._at_save.get(step, useful if step else 0.0))
        for activity in ("step", "input"):
            fraction = self._seconds[activity] / useful if useful else 0.0
            self._seconds["lost"] += fraction * (useful - kept)
            self._seconds[activity] -= fraction * (useful - kept)
        self._at_save = {key: seconds for key, seconds in self._at_save.items() if key <= step}

    def switch(self, activity: str) -> None:
        """End the current activity and start another."""
        now = time.monotonic()
        self._seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now

    def saved(self, step: int) -> None:
        """Record that the steps up to `step` are saved."""
        self._at_save[step] = self._useful()
        self._at_save = dict(list(self._at_save.items())[-_MAX_SAVES:])

    def write(self) -> None:
        """Write the seconds so far, for the next session."""
        self.switch(self._activity)
        value = {"seconds": self._seconds, "sessions": self._sessions, "at_save": self._at_save}
        write_json(self._path, value)

    def describe(self) -> str:
        """Return one line with the fraction of the wall time in steps and in each other activity."""
        self.switch(self._activity)
        total = sum(self._seconds.values())
        rest = sorted(((s, a) for a, s in self._seconds.items() if a != "step"), reverse=True)
        others = ", ".join(f"{activity} {seconds / total:.0%}" for seconds, activity in rest if seconds)
        sessions = f" in {self._sessions} sessions" if self._sessions > 1 else ""
        return f"goodput: {self._seconds['step'] / total:.0%} of {total:.0f} s{sessions} in steps; {others}"

    def _useful(self) -> float:
        """Return the seconds of steps and of their waits for data, without those already counted as lost."""
        return self._seconds["step"] + self._seconds["input"]


class Progress:
    """Measure the recent speed of training steps, without compilation, evaluations and saves.

    Averages are weighted by time: the weight of a measurement halves every minute of training.
    """

    def __init__(self, workers: int, cores: int):
        """Start measuring.

        Args:
          workers: config.data.workers.
          cores: CPU cores available to this process.
        """
        self._workers, self._cores = workers, cores
        self._steps = self._seconds = self._waited = 0.0
        self._all_steps, self._all_seconds = 0, 0.0
        self._advised = False

    def add(self, steps: int, seconds: float, waited: float) -> None:
        """Record an interval: its steps, its seconds, and how many of them were spent waiting for data."""
        keep = 0.5 ** (seconds / _HALF_LIFE)
        self._steps = keep * self._steps + steps
        self._seconds = keep * self._seconds + seconds
        self._waited = keep * self._waited + waited
        self._all_steps, self._all_seconds = self._all_steps + steps, self._all_seconds + seconds

    def remaining(self, steps: int) -> float:
        """Return the expected duration of `steps` more steps in seconds."""
        return steps * self._seconds / self._steps

    def advice(self) -> str | None:
        """Return one line of advice if steps wait for data; at most once, when the average has settled."""
        settled = self._all_steps >= _SETTLED_STEPS or self._all_seconds >= _SETTLED_SECONDS
        fraction = self._waited / self._seconds if self._seconds else 0.0
        if self._advised or not settled or fraction <= _HIGH_DATA_WAIT:
            return None
        self._advised = True
        # The number of workers that would keep up with the steps, if reading speed is proportional to it.
        wanted = math.ceil(max(self._workers, 1) / max(1 - fraction, 1e-6))
        workers, cores = min(wanted, self._cores), f"{self._cores} CPU core{'s' * (self._cores > 1)}"
        problem = f"note: {fraction:.0%} of the time in steps is spent waiting for data"
        if workers > max(self._workers, 1):
            return f"{problem}; try --config.data.workers={workers} (now {self._workers}, {cores} available)"
        return (
            f"{problem}, and config.data.workers={self._workers} already uses the {cores} available; store"
            " smaller images or clips, augment less, or use a machine with more cores"
        )
