"""The outcome of an ablation, as a table, as numbers, and as a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from structvit_jax.analysis.ablate.grid import Arm, RunResult, Size, Study
from structvit_jax.analysis.ablate.statistics import Summary, compare, summarize

_NOTE = (
    "Differences are taken seed by seed, with 95 % confidence intervals of their mean (Student's t over"
    " seeds); **bold** where the interval leaves out zero. All runs share test clips; others are another"
    " matter. Several intervals are looked at, and one in twenty leaves out zero by chance. A step's time is"
    " that of the compiled train step, a median over turns that all arms took; input comes on top of it, the"
    " same for all."
)


class Outcome(NamedTuple):
    """Of one arm."""

    arm: Arm
    size: Size
    seconds: float  # of a train step, without its input
    lr: float
    tried: Sequence[RunResult]  # on clips to tune on
    steps: Sequence[RunResult]  # as many steps as the others
    time: Sequence[RunResult]  # as much time as the others; none where that was not asked for


def document(outcomes: Sequence[Outcome], against: str, same_time: str, heading: Sequence[str]) -> str:
    """Markdown: what was run, a table for equal steps, one for equal time once all arms have had it, and what
    learning rates were chosen by."""
    parts = ["\n".join(heading), _scores(outcomes, "steps", against, "Equal steps")]
    if same_time and all(outcome.time for outcome in outcomes):
        parts.append(_scores(outcomes, "time", against, f"Equal time, that of {same_time}"))
    parts.append(_NOTE)
    if all(outcome.tried for outcome in outcomes):
        parts.append(_rates(outcomes))
    return "\n\n".join(parts) + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"### {title}", "", *lines])


def _scores(outcomes: Sequence[Outcome], kind: str, against: str, title: str) -> str:
    head = ["arm", "top-1", "seeds", f"difference from {against}", "steps", "lr", "ms a step"]
    head += ["parameters", "multiply-accumulates"]
    base = next(_top1(outcome, kind) for outcome in outcomes if outcome.arm.name == against)
    rows = [_row(outcome, kind, base, outcome.arm.name == against) for outcome in outcomes]
    return _table(title, head, rows)


def _rates(outcomes: Sequence[Outcome]) -> str:
    rates = list(dict.fromkeys(run.lr for run in outcomes[0].tried))
    rows = []
    for outcome in outcomes:
        tried = [[run.top1 for run in outcome.tried if run.lr == rate] for rate in rates]
        scores = [_spread(summarize(top1)) for top1 in tried]
        marked = [f"**{it}**" if rate == outcome.lr else it for rate, it in zip(rates, scores, strict=True)]
        rows.append([outcome.arm.name, *marked])
    title = "Top-1 on clips to tune on, by learning rate, in **bold** what was chosen"
    return _table(title, ["arm", *(f"{rate:g}" for rate in rates)], rows)


def _spread(summary: Summary) -> str:
    deviation = "" if math.isnan(summary.deviation) else f" ± {summary.deviation:.3f}"
    return f"{summary.mean:.3f}{deviation}"


def _row(outcome: Outcome, kind: str, base: Sequence[float], is_base: bool) -> list[str]:
    found = getattr(outcome, kind)
    top1 = _top1(outcome, kind)
    summary = summarize(top1)
    return [
        outcome.arm.name,
        _spread(summary),
        str(summary.seeds),
        "" if is_base else _difference(top1, base),
        str(found[0].steps),
        f"{outcome.lr:g}",
        f"{1000 * outcome.seconds:.1f}",
        f"{outcome.size.params:,}",
        f"{outcome.size.macs:,}",
    ]


def _difference(values: Sequence[float], base: Sequence[float]) -> str:
    found = compare(values, base)
    if math.isnan(found.low):
        return f"{found.difference:+.3f}"
    text = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.clear else text


def _top1(outcome: Outcome, kind: str) -> list[float]:
    return [one.top1 for one in getattr(outcome, kind)]


def numbers(outcomes: Sequence[Outcome], settings: Mapping[str, Any], study: Study) -> str:
    """Return every run as JSON."""
    arms = [
        {
            "arm": outcome.arm.name,
            "changes": outcome.arm.changes,
            **outcome.size._asdict(),
            "seconds": outcome.seconds,
            "lr": outcome.lr,
            **{
                kind: [one._asdict() for one in getattr(outcome, kind)] for kind in ("tried", "steps", "time")
            },
        }
        for outcome in outcomes
    ]
    return json.dumps({"settings": settings, "study": study._asdict(), "arms": arms}, indent=2) + "\n"


def plot(outcomes: Sequence[Outcome], chance: float) -> bytes:
    """Every seed as a dot and every mean as a line, for equal steps and, where there is it, time; a PNG."""
    from matplotlib.figure import Figure  # here: half a second, for those who draw

    kinds = ["steps"] + ["time"] * bool(outcomes[0].time)
    figure = Figure(figsize=(2 + 1.0 * len(outcomes), 4.2), layout="constrained")
    axes = figure.subplots()
    colours = {"steps": "#0072b2", "time": "#d55e00"}
    for shift, kind in zip((-0.12, 0.12) if len(kinds) > 1 else (0.0,), kinds, strict=True):
        for place, outcome in enumerate(outcomes):
            top1 = _top1(outcome, kind)
            label = f"equal {kind}" if place == 0 else None
            axes.plot([place + shift] * len(top1), top1, "o", color=colours[kind], alpha=0.6, label=label)
            mean = summarize(top1).mean
            axes.plot([place + shift - 0.1, place + shift + 0.1], [mean, mean], color=colours[kind])
    axes.axhline(chance, color="#777777", linestyle=":", label="chance")
    axes.set_xticks(range(len(outcomes)), [outcome.arm.name for outcome in outcomes], rotation=30, ha="right")
    axes.set_ylabel("top-1 on test clips")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
