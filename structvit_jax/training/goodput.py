"""Where the wall time of a run goes, over all its restarts."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

from etils import epath

from structvit_jax.training.storage import read_json, write_json

FILE = "goodput.json"
# What a run does with its time; "lost" are steps that a kill undid and that are taken again.
ACTIVITIES = ("start", "restore", "compile", "input", "step", "evaluate", "save", "lost")
_REMEMBERED = 20  # saves, of which one will be where the next session starts


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
