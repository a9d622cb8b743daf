"""Measure how a run spends its wall time, and the speed of its recent steps.

Goodput is the fraction of the wall time that is spent in steps. It covers all sessions of a run: each restart
begins a new session.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from structvit_jax.runtime.storage import read_json, write_json

FILE = "goodput.json"
# "lost" is the time of steps that were not saved before a kill, and had to be repeated.
ACTIVITIES = ("start", "restore", "compile", "input", "step", "evaluate", "save", "lost")
_MAX_SAVES = 20  # number of latest saves to record; the next session starts at one of them
_MAX_SECONDS = 1e15  # a file with a larger value is damaged
_HALF_LIFE = 60.0  # seconds of training after which the weight of a measurement halves
_RECENT = 60.0  # seconds of training over which the wait for data is judged
_HIGH_DATA_WAIT = 0.3  # fraction of these seconds
_BETWEEN_REPORTS = 600.0  # seconds of training


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

    def switch(self, activity: str, overlap: float = 0.0) -> None:
        """End the current activity and start another.

        Args:
          activity: the next activity.
          overlap: seconds of the current one that count as seconds of the next, since both ran at that time.
        """
        now = time.monotonic()
        overlap = min(overlap, now - self._since)
        self._seconds[self._activity] += now - self._since - overlap
        self._seconds[activity] += overlap
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


class Interval(NamedTuple):
    """Measurements of consecutive steps."""

    steps: int
    seconds: float
    waited: float  # how many of these seconds the steps waited for data
    reading: Mapping[str, float]  # seconds by stage of reading, summed over the batches


class DataWait(NamedTuple):
    """A long wait for data, and the stage of reading that takes the most time."""

    fraction: float  # of the time
    stage: str
    stage_fraction: float  # of the time of all stages


class Progress:
    """Measure the recent speed of training steps, without compilation, evaluations and saves."""

    def __init__(self) -> None:
        self._steps = self._seconds = 0.0  # weighted: the weight of an interval halves every _HALF_LIFE
        self._recent: collections.deque[Interval] = collections.deque()
        self._since_report = _BETWEEN_REPORTS

    def add(self, interval: Interval) -> None:
        """Record the interval that has just ended."""
        keep = 0.5 ** (interval.seconds / _HALF_LIFE)
        self._steps = keep * self._steps + interval.steps
        self._seconds = keep * self._seconds + interval.seconds
        self._recent.append(interval)
        while sum(one.seconds for one in self._recent) - self._recent[0].seconds >= _RECENT:
            self._recent.popleft()
        self._since_report += interval.seconds

    def remaining(self, steps: int) -> float:
        """Return the expected duration of `steps` more steps in seconds."""
        return steps * self._seconds / self._steps

    def data_wait(self) -> DataWait | None:
        """Return the wait for data if it was long in the last minute; at most once in ten minutes."""
        seconds = sum(one.seconds for one in self._recent)
        fraction = sum(one.waited for one in self._recent) / max(seconds, 1e-9)
        if seconds < _RECENT or fraction <= _HIGH_DATA_WAIT or self._since_report < _BETWEEN_REPORTS:
            return None
        self._since_report = 0.0
        reading = collections.Counter[str]()
        for one in self._recent:
            reading.update(one.reading)  # adds
        stage, longest = max(reading.items(), key=lambda item: item[1])
        return DataWait(fraction, stage, longest / max(sum(reading.values()), 1e-9))
