"""Results of an ablation: paired statistics, Markdown tables, JSON and a plot."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from structvit_jax.analysis.ablate.study import Arm, Study
from structvit_jax.utils.tables import markdown_table

_NOTE = (
    "Differences are paired by seed, with 95 % confidence intervals of their mean (Student's t over seeds);"
    " they are **bold** if the interval excludes zero. All runs use the same test examples, so the intervals"
    " do not include the variation between test sets. By chance, one interval in twenty excludes zero. The"
    " time of a step is the median time of the compiled train step, measured in rounds that alternate between"
    " arms. It does not include input, which is the same for all arms."
)


class RunResult(NamedTuple):
    """Results of a run."""

    seed: int
    lr: float
    steps: int
    top1: float
    took: float  # wall time in seconds, over all restarts


class Outcome(NamedTuple):
    """Results of an arm."""

    arm: Arm
    params: int
    macs: int  # multiply-accumulates of one example
    seconds: float  # per train step, without waiting for input
    lr: float  # the selected learning rate
    tried: Sequence[RunResult]  # runs with all learning rates, scored on validation examples
    steps: Sequence[RunResult]  # one run per seed; all arms have the same number of steps or epochs
    time: Sequence[RunResult] = ()  # one run per seed; all arms have the same training time (--same_time)


class Comparison(NamedTuple):
    """Mean difference of two arms over pairs of runs with the same seed."""

    difference: float
    low: float  # low and high: 95 % confidence interval (Student's t); nan if there is one pair
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def compare(values: Sequence[float], base: Sequence[float]) -> Comparison:
    """Return the mean of the paired differences `values` - `base`, with its confidence interval.

    The interval assumes that the differences are normally distributed; a few pairs cannot test this. It does
    not include the variation between test sets, because all runs use the same test examples.
    """
    difference = float(np.subtract(values, base).mean())
    if len(values) < 2:
        return Comparison(difference, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns if all differences are equal
        interval = ttest_rel(values, base).confidence_interval()
    return Comparison(difference, float(interval.low), float(interval.high))


def effort(outcomes: Sequence[Outcome]) -> str:
    """Return a text with the number of runs and their total hours."""
    runs = [run for outcome in outcomes for run in (*outcome.tried, *outcome.steps)]
    runs += [run for outcome in outcomes if outcome.time is not outcome.steps for run in outcome.time]
    return f"{len(runs)} runs, {sum(run.took for run in runs) / 3600:.1f} hours"


def to_markdown(outcomes: Sequence[Outcome], against: str, same_time: str, heading: Sequence[str]) -> str:
    """Return the document: the heading, and tables of equal steps, equal time and learning rates.

    Args:
      outcomes: results of the complete arms. The table of equal time needs such runs of all of them.
      against: the arm that the others are compared with.
      same_time: the arm that sets the equal time, or "".
      heading: lines above the tables.
    """
    equal_steps = [outcome.steps for outcome in outcomes]
    parts = ["\n".join(heading), _results_table("Equal steps", outcomes, equal_steps, against)]
    if same_time and all(outcome.time for outcome in outcomes):
        equal_time = [outcome.time for outcome in outcomes]
        parts.append(
            _results_table(f"Equal time (the training time of {same_time})", outcomes, equal_time, against)
        )
    parts.append(_NOTE)
    if all(outcome.tried for outcome in outcomes):
        parts.append(_rates_table(outcomes))
    return "\n\n".join(parts) + "\n"


def _results_table(
    title: str, outcomes: Sequence[Outcome], runs: Sequence[Sequence[RunResult]], against: str
) -> str:
    """Return a table with one row per outcome; `runs` has the runs of each outcome."""
    head = ["arm", "top-1", "seeds", f"difference from {against}", "steps", "lr", "ms per step"]
    head += ["parameters", "multiply-accumulates"]
    scores = {outcome.arm.name: _top1(own) for outcome, own in zip(outcomes, runs, strict=True)}
    rows = []
    for outcome, own in zip(outcomes, runs, strict=True):
        name = outcome.arm.name
        difference = "" if name == against else _difference(scores[name], scores[against])
        row = [name, _spread(scores[name]), str(len(own)), difference, str(own[0].steps), f"{outcome.lr:g}"]
        row += [f"{1000 * outcome.seconds:.1f}", f"{outcome.params:,}", f"{outcome.macs:,}"]
        rows.append(row)
    return f"### {title}\n\n{markdown_table(head, rows)}"


def _rates_table(outcomes: Sequence[Outcome]) -> str:
    rates = list(dict.fromkeys(run.lr for run in outcomes[0].tried))
    rows = []
    for outcome in outcomes:
        row = [outcome.arm.name]
        for rate in rates:
            text = _spread(_top1([run for run in outcome.tried if run.lr == rate]))
            row.append(f"**{text}**" if rate == outcome.lr else text)
        rows.append(row)
    title = "Top-1 on validation examples by learning rate; the selected rate in **bold**"
    return f"### {title}\n\n{markdown_table(['arm', *(f'{rate:g}' for rate in rates)], rows)}"


def _top1(runs: Sequence[RunResult]) -> list[float]:
    return [run.top1 for run in runs]


def _spread(values: Sequence[float]) -> str:
    """Return the mean and, if there are at least two values, the sample standard deviation, as text."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _difference(values: Sequence[float], base: Sequence[float]) -> str:
    result = compare(values, base)
    if math.isnan(result.low):
        return f"{result.difference:+.3f}"
    text = f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"
    return f"**{text}**" if result.is_clear else text


def to_json(outcomes: Sequence[Outcome], settings: Mapping[str, Any], study: Study) -> str:
    """Return the configuration, the study and all runs as JSON."""
    arms = []
    for outcome in outcomes:
        record = {"arm": outcome.arm.name, "changes": outcome.arm.changes}
        record |= {key: getattr(outcome, key) for key in ("params", "macs", "seconds", "lr")}
        for kind in ("tried", "steps", "time"):
            record[kind] = [run._asdict() for run in getattr(outcome, kind)]
        arms.append(record)
    return json.dumps({"settings": settings, "study": study._asdict(), "arms": arms}, indent=2) + "\n"


def plot(outcomes: Sequence[Outcome], chance: float) -> bytes:
    """Return a plot as PNG: each run is a dot at its top-1, and means are lines."""
    shift = 0.12 if outcomes[0].time else 0.0
    figure = Figure(figsize=(2 + len(outcomes), 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, colour, offset in (("steps", "#0072b2", -shift), ("time", "#d55e00", shift)):
        for number, outcome in enumerate(outcomes):
            x, top1 = number + offset, _top1(getattr(outcome, kind))
            if top1:
                label = f"equal {kind}" if number == 0 else None
                axes.plot([x] * len(top1), top1, "o", color=colour, alpha=0.6, label=label)
                axes.plot([x - 0.1, x + 0.1], [np.mean(top1)] * 2, color=colour)
    axes.axhline(chance, color="#777777", linestyle=":", label="chance")
    axes.set_xticks(range(len(outcomes)), [outcome.arm.name for outcome in outcomes], rotation=30, ha="right")
    axes.set_ylabel("top-1 on test examples")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
