"""Where the wall time of a run goes, over all its restarts, and how fast its steps are now."""

from __future__ import annotations

import math
import re
import time
from typing import Any, NamedTuple

from etils import epath

from structvit_jax.runtime.storage import read_json, write_json

FILE = "goodput.json"
# What a run does with its time; "lost" are steps that a kill undid and that are taken again.
ACTIVITIES = ("start", "restore", "compile", "input", "step", "evaluate", "save", "lost")
_REMEMBERED = 20  # saves, of which one will be where the next session starts
_HALF_LIFE = 60.0  # seconds after which a measurement counts half
_SETTLED_STEPS, _SETTLED_SECONDS = 50, 60.0  # either is enough to judge the data wait
_HIGH_DATA_WAIT = 0.3  # of the time in steps


class _Kept(NamedTuple):
    """What earlier sessions of a run wrote."""

    seconds: dict[str, float]  # by activity
    sessions: int
    at_save: dict[str, float]  # useful seconds so far, by the step that was saved


def _read(workdir: epath.Path) -> _Kept:
    """Read the file of a workdir; what is missing in it, or is not a number, counts as nothing."""
    try:
        found = read_json(workdir / FILE) or {}
    except OSError:
        found = {}
    sessions = found.get("sessions")
    seconds = {name: s for name, s in _times(found.get("seconds")).items() if name in ACTIVITIES}
    saved = {step: s for step, s in _times(found.get("at_save")).items() if re.fullmatch("[0-9]{1,15}", step)}
    return _Kept(seconds, sessions if isinstance(sessions, int) else 0, saved)


def _times(value: Any) -> dict[str, float]:
    items = value.items() if isinstance(value, dict) else ()
    return {k: float(s) for k, s in items if isinstance(s, int | float) and 0 <= s < 1e15}


def seconds_of(workdir: epath.Path) -> dict[str, float]:
    """Return the seconds that a run has spent in each activity, over all its restarts; {} if unknown."""
    return _read(workdir).seconds


def wall_seconds(workdir: epath.Path) -> float:
    """Return the wall time that a run has taken, over all its restarts; 0 if unknown."""
    return sum(seconds_of(workdir).values())


class Goodput:
    """Seconds per activity. One activity follows another: `switch` names the next."""

    def __init__(self, workdir: epath.Path, started: float | None = None):
        """`started`: when this session began, by time.monotonic; now, if not given."""
        old = _read(workdir)
        self._path = workdir / FILE
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0) | old.seconds
        self._at_save = old.at_save
        self._sessions = old.sessions + 1
        self._activity, self._since = "start", time.monotonic() if started is None else started

    def resume(self, step: int) -> None:
        """Counts what a former session did after `step` as lost."""
        useful = self._useful()
        kept = min(useful, self._at_save.get(str(step), 0.0 if step == 0 else useful))
        for activity in ("step", "input"):
            share = self._seconds[activity] / useful if useful else 0.0
            self._seconds["lost"] += share * (useful - kept)
            self._seconds[activity] -= share * (useful - kept)
        self._at_save = {key: seconds for key, seconds in self._at_save.items() if int(key) <= step}

    def switch(self, activity: str) -> str:
        """Starts an activity; returns the one that it ends."""
        now, before = time.monotonic(), self._activity
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    def saved(self, step: int) -> None:
        """Notes that the work up to `step` is kept."""
        self._at_save[str(step)] = self._useful()
        self._at_save = dict(list(self._at_save.items())[-_REMEMBERED:])

    def write(self) -> None:
        """Writes the seconds so far, for the next session."""
        self.switch(self._activity)
        value = {"seconds": self._seconds, "sessions": self._sessions, "at_save": self._at_save}
        write_json(self._path, value)

    def describe(self) -> str:
        """One line: the share of the wall time in steps, and what took the rest."""
        self.switch(self._activity)
        total = sum(self._seconds.values())
        rest = sorted(((s, a) for a, s in self._seconds.items() if a != "step"), reverse=True)
        shares = ", ".join(f"{activity} {seconds / total:.0%}" for seconds, activity in rest if seconds)
        sessions = f" in {self._sessions} sessions" if self._sessions > 1 else ""
        return f"goodput: {self._seconds['step'] / total:.0%} of {total:.0f} s{sessions} in steps; {shares}"

    def _useful(self) -> float:
        return self._seconds["step"] + self._seconds["input"]


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
