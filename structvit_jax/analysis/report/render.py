"""Render a report: runs side by side, then the classes and the most confident errors of each run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from structvit_jax.analysis import html
from structvit_jax.analysis.html import EmbeddedImage
from structvit_jax.analysis.report.charts import (
    CHARTS,
    SMOOTHING,
    LineStyle,
    draw_confusion,
    draw_curves,
    line_style,
)
from structvit_jax.analysis.report.predictions import ClassScore, Predictions
from structvit_jax.analysis.report.record import Record, read_records
from structvit_jax.analysis.report.thumbnails import Thumbnails
from structvit_jax.runtime.goodput import ACTIVITIES
from structvit_jax.runtime.storage import io_errors_as_user_error, write
from structvit_jax.training.card import as_json, differences
from structvit_jax.utils.errors import DecodeError
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

_FILE = "report.html"
_UNKNOWN = "–"
# The palette of Okabe and Ito, in the order of ACTIVITIES.
_ACTIVITY_COLOURS = ("#999999", "#cc79a7", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#f0e442", "#d55e00")
_WORST, _BEST = 20, 5  # classes at either end that are not folded away
_MAX_TABLE, _MAX_DRAWN = 20, 1000  # classes of a confusion matrix shown as a table, and as an image


class ClassTable(NamedTuple):
    """Classes that are listed together."""

    label: str
    scores: Sequence[ClassScore]
    is_folded: bool = False


class ConfusionMatrix(NamedTuple):
    """Counts for a table, or an image if there are many classes; neither if there are too many to draw."""

    counts: Sequence[Sequence[int]] | None = None
    image: EmbeddedImage | None = None


class ErrorCard(NamedTuple):
    """A wrong example."""

    id: str
    image: EmbeddedImage | None
    problem: str  # why there is no image
    classes: Sequence[tuple[str, str, float]]  # the predicted and the true class: role, name, probability


class ClassResults(NamedTuple):
    """Results of a run by class."""

    names: Sequence[str]
    tables: Sequence[ClassTable]
    confusion: ConfusionMatrix
    without_examples: int  # classes
    undefined: int  # examples with NaN scores


class ErrorResults(NamedTuple):
    """The most confident errors of a run."""

    cards: Sequence[ErrorCard]
    problem: str  # why no card has an image; "" if they can be drawn


class RunSection(NamedTuple):
    """A run on the page."""

    name: str
    workdir: str
    style: LineStyle
    unit: str
    notes: Sequence[str]
    seconds: Mapping[str, float]
    classes: ClassResults | None
    errors: ErrorResults | None


def write_report(workdirs: Sequence[str], out: str | None = None, hardest: int = 24) -> epath.Path:
    """Write the page and return its path: `out`, or report.html in the first workdir.

    Args:
      workdirs: of one or more runs, on a disk or in a bucket.
      out: path of the page, on a disk or in a bucket.
      hardest: how many of the most confident errors of each run to show.

    Raises:
      UserError: a folder that is not the workdir of a run, a damaged file, or an `out` that cannot be
        written.
    """
    with io_errors_as_user_error(parse_path(workdirs[0])):
        records = read_records(workdirs)
        path = parse_path(out) if out else records[0].workdir / _FILE
        content = render(records, hardest)
        with write_errors_as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)
    return path


def render(records: Sequence[Record], hardest: int) -> str:
    """Return the page; `hardest` is how many of the most confident errors of each run to show."""
    facts = [_facts(record) for record in records]
    return html.render(
        "report.html",
        written=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        runs=[_run_section(record, number, hardest) for number, record in enumerate(records)],
        facts={name: [fact[name] for fact in facts] for name in facts[0]},
        differences=_differences(records),
        charts=[image for chart in CHARTS if (image := draw_curves(chart, records))],
        smoothing=SMOOTHING,
        activities=dict(zip(ACTIVITIES, _ACTIVITY_COLOURS, strict=True)),
        best=_BEST,
    )


def _facts(record: Record) -> dict[str, str]:
    """Return the rows of the summary."""
    result, seconds = record.result, record.seconds

    def score(key: str) -> str:
        return f"{result[key]:.4f}" if isinstance(result.get(key), int | float) else _UNKNOWN

    goodput = seconds.get("step", 0) / (sum(seconds.values()) or 1)
    return {
        "model": record.config.model.name,
        "parameters": f"{record.parameters:,}" if record.parameters else _UNKNOWN,
        "step": str(record.step),
        "top-1": score("top1") if result else "not evaluated yet",
        "top-5": score("top5"),
        "mean over classes": score("mean_class"),
        "test examples": str(result.get("examples", _UNKNOWN)),
        "of them unreadable": str(result.get("missing", _UNKNOWN)),
        "speed": f"{record.rate:.1f} {record.unit}/s" if record.rate else _UNKNOWN,
        "goodput": f"{goodput:.0%}" if seconds else _UNKNOWN,
    }


def _differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the configuration keys that differ between runs, each with the value of every run."""
    first, *others = (as_json(record.config) for record in records)
    changes = [
        {f"config.{d.key}": (d.before, d.after) for d in differences(first, other, portable=False)}
        for other in others
    ]
    before = {key: values[0] for change in changes for key, values in change.items()}
    return {
        key: [value, *(change[key][1] if key in change else value for change in changes)]
        for key, value in sorted(before.items())
    }


def _run_section(record: Record, number: int, hardest: int) -> RunSection:
    classes = errors = None
    if record.predictions:
        classes = _class_results(record.predictions)
        errors = _error_results(record, record.predictions, hardest)
    return RunSection(
        record.name,
        str(record.workdir),
        line_style(number),
        record.unit,
        record.notes(),
        record.seconds,
        classes,
        errors,
    )


def _class_results(predictions: Predictions) -> ClassResults:
    scores, names = predictions.by_class(), predictions.class_names
    tables = [ClassTable("accuracy by class", scores)]
    if between := scores[_WORST:-_BEST]:
        tables = [
            ClassTable(f"the {_WORST} classes with the lowest accuracy", scores[:_WORST]),
            ClassTable("classes between", between, is_folded=True),
            ClassTable(f"the {_BEST} classes with the highest accuracy", scores[-_BEST:]),
        ]
    undefined = int((predictions.predicted < 0).sum())
    return ClassResults(names, tables, confusion_matrix(predictions), len(names) - len(scores), undefined)


def confusion_matrix(predictions: Predictions) -> ConfusionMatrix:
    """Return the matrix in the form that suits its number of classes."""
    classes = len(predictions.class_names)
    if classes > _MAX_DRAWN:
        return ConfusionMatrix()
    counts = predictions.confusion()
    if classes > _MAX_TABLE:
        return ConfusionMatrix(image=draw_confusion(counts))
    return ConfusionMatrix(counts.tolist())


def _error_results(record: Record, predictions: Predictions, count: int) -> ErrorResults:
    errors = predictions.confident_errors(count, record.config.eval.average)
    thumbnails, problem = None, ""
    try:
        thumbnails = Thumbnails(record.config) if errors else None
    except DecodeError as error:
        problem = str(error)
    return ErrorResults([_error_card(predictions, thumbnails, *error) for error in errors], problem)


def _error_card(
    predictions: Predictions, thumbnails: Thumbnails | None, index: int, probabilities: np.ndarray
) -> ErrorCard:
    name, image, problem = str(predictions.ids[index]), None, ""
    try:
        image = thumbnails.image(name) if thumbnails else None
    except DecodeError as error:
        problem = str(error)
    roles = {"predicted": int(probabilities.argmax()), "true": int(predictions.labels[index])}
    names = predictions.class_names
    classes = [(role, names[number], float(probabilities[number])) for role, number in roles.items()]
    return ErrorCard(name, image, problem, classes)
