"""Results of an ablation as Markdown tables, as JSON, and as a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from structvit_jax.analysis.ablate.grid import Arm, RunResult, Size, Study
from structvit_jax.analysis.ablate.statistics import Summary, compare, summarize

_NOTE = (
    "Differences are paired by seed, with 95 % confidence intervals of their mean (Student's t over seeds);"
    " **bold** if the interval excludes zero. All runs share their test clips, so the intervals do not cover"
    " other clips. One interval in twenty excludes zero by chance. The time of a step is the median of the"
    " compiled train step over rounds that alternate between arms; input, which is the same for all arms, is"
    " not included."
)
Kind = Literal["steps", "time"]


class Outcome(NamedTuple):
    """Results of an arm."""

    arm: Arm
    size: Size
    seconds: float  # of a train step, without input
    lr: float
    tried: Sequence[RunResult]  # on validation clips
    steps: Sequence[RunResult]  # with equal steps
    time: Sequence[RunResult]  # with equal time; () without --same_time

    def runs(self, kind: Kind) -> Sequence[RunResult]:
        return self.steps if kind == "steps" else self.time

    def top1(self, kind: Kind) -> list[float]:
        """Return the top-1 of every seed."""
        return [run.top1 for run in self.runs(kind)]


def to_markdown(outcomes: Sequence[Outcome], against: str, same_time: str, heading: Sequence[str]) -> str:
    """Return a document: the heading, the results with equal steps and equal time, and learning rates.

    Args:
      outcomes: of the complete arms; equal time is shown once all of them have such runs.
      against: the arm that the others are compared with.
      same_time: the arm that sets the equal time, or "".
      heading: lines above the tables.
    """
    parts = ["\n".join(heading), _results_table(outcomes, "steps", against, "Equal steps")]
    if same_time and all(outcome.time for outcome in outcomes):
        parts.append(_results_table(outcomes, "time", against, f"Equal time, that of {same_time}"))
    parts.append(_NOTE)
    if all(outcome.tried for outcome in outcomes):
        parts.append(_rates_table(outcomes))
    return "\n\n".join(parts) + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"### {title}", "", *lines])


def _results_table(outcomes: Sequence[Outcome], kind: Kind, against: str, title: str) -> str:
    head = ["arm", "top-1", "seeds", f"difference from {against}", "steps", "lr", "ms per step"]
    head += ["parameters", "multiply-accumulates"]
    base = next(outcome.top1(kind) for outcome in outcomes if outcome.arm.name == against)
    rows = []
    for outcome in outcomes:
        top1 = outcome.top1(kind)
        row = [outcome.arm.name, _spread(summarize(top1)), str(len(top1))]
        row += ["" if outcome.arm.name == against else _difference(top1, base)]
        row += [str(outcome.runs(kind)[0].steps), f"{outcome.lr:g}", f"{1000 * outcome.seconds:.1f}"]
        rows.append([*row, f"{outcome.size.params:,}", f"{outcome.size.macs:,}"])
    return _table(title, head, rows)


def _rates_table(outcomes: Sequence[Outcome]) -> str:
    rates = list(dict.fromkeys(run.lr for run in outcomes[0].tried))
    rows = []
    for outcome in outcomes:
        row = [outcome.arm.name]
        for rate in rates:
            text = _spread(summarize([run.top1 for run in outcome.tried if run.lr == rate]))
            row.append(f"**{text}**" if rate == outcome.lr else text)
        rows.append(row)
    title = "Top-1 on validation clips by learning rate; the selected rate in **bold**"
    return _table(title, ["arm", *(f"{rate:g}" for rate in rates)], rows)


def _spread(summary: Summary) -> str:
    deviation = "" if math.isnan(summary.deviation) else f" ± {summary.deviation:.3f}"
    return f"{summary.mean:.3f}{deviation}"


def _difference(values: Sequence[float], base: Sequence[float]) -> str:
    result = compare(values, base)
    if math.isnan(result.low):
        return f"{result.difference:+.3f}"
    text = f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"
    return f"**{text}**" if result.is_clear else text


def to_json(outcomes: Sequence[Outcome], settings: Mapping[str, Any], study: Study) -> str:
    """Return the configuration, the study and every run as JSON."""
    arms = [
        {"arm": outcome.arm.name, "changes": outcome.arm.changes}
        | outcome.size._asdict()
        | {"seconds": outcome.seconds, "lr": outcome.lr}
        | {kind: [run._asdict() for run in getattr(outcome, kind)] for kind in ("tried", "steps", "time")}
        for outcome in outcomes
    ]
    return json.dumps({"settings": settings, "study": study._asdict(), "arms": arms}, indent=2) + "\n"


def plot(outcomes: Sequence[Outcome], chance: float) -> bytes:
    """Return a PNG: the top-1 of every seed as a dot, means as lines, for equal steps and equal time."""
    from matplotlib.figure import Figure  # lazy: it takes half a second

    kinds: list[tuple[Kind, str, float]] = [("steps", "#0072b2", 0.0)]
    if outcomes[0].time:
        kinds = [("steps", "#0072b2", -0.12), ("time", "#d55e00", 0.12)]
    figure = Figure(figsize=(2 + 1.0 * len(outcomes), 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, colour, shift in kinds:
        for number, outcome in enumerate(outcomes):
            x, top1 = number + shift, outcome.top1(kind)
            label = f"equal {kind}" if number == 0 else None
            axes.plot([x] * len(top1), top1, "o", color=colour, alpha=0.6, label=label)
            mean = summarize(top1).mean
            axes.plot([x - 0.1, x + 0.1], [mean, mean], color=colour)
    axes.axhline(chance, color="#777777", linestyle=":", label="chance")
    axes.set_xticks(range(len(outcomes)), [outcome.arm.name for outcome in outcomes], rotation=30, ha="right")
    axes.set_ylabel("top-1 on test clips")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
