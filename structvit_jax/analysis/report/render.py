"""Render a report: all runs side by side, then results by class and the most confident errors of each run."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from structvit_jax import data
from structvit_jax.analysis import html
from structvit_jax.analysis.contact_sheet import evenly_spaced, side_by_side
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
from structvit_jax.runtime.goodput import ACTIVITIES
from structvit_jax.runtime.storage import io_errors_as_user_error, write
from structvit_jax.training.card import as_json, keys_of
from structvit_jax.utils.failures import DecodeError, decoding
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

_FILE = "report.html"
_UNKNOWN = "–"
# The palette of Okabe and Ito; one colour for each of ACTIVITIES.
_ACTIVITY_COLOURS = ("#999999", "#cc79a7", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#f0e442", "#d55e00")
_MAX_TABLE, _MAX_DRAWN = 20, 1000  # maximum classes of a confusion matrix: as a table, as an image
_THUMBNAIL_FRAMES = 4  # frames of a clip, shown side by side
_THUMBNAIL_HEIGHT = 112  # pixels; taller thumbnails are reduced and stored as JPEG


class ErrorCard(NamedTuple):
    """A misclassified example."""

    number: int  # index of the example in the predictions
    probabilities: np.ndarray  # [classes]
    image: EmbeddedImage | None = None
    problem: str = ""  # why there is no image


class RunSection(NamedTuple):
    """The section of one run on the page."""

    record: Record
    style: LineStyle
    scores: Sequence[ClassScore] = ()  # lowest accuracy first
    confusion: Sequence[Sequence[int]] | EmbeddedImage | None = None
    errors: Sequence[ErrorCard] = ()
    problem: str = ""  # why there are no images at all


def write_report(workdirs: Sequence[str], out: str | None = None, hardest: int = 24) -> epath.Path:
    """Write the page and return its path: `out`, or report.html in the first workdir.

    Args:
      workdirs: workdirs of one or more runs, on a disk or in a bucket.
      out: path of the page, on a disk or in a bucket.
      hardest: how many of the most confident errors of each run to show.

    Raises:
      UserError: a folder is not the workdir of a run, a file is damaged, or `out` cannot be written.
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
        runs=[_section(record, line_style(number), hardest) for number, record in enumerate(records)],
        facts={name: [fact[name] for fact in facts] for name in facts[0]},
        differences=_differences(records),
        charts=[image for chart in CHARTS if (image := draw_curves(chart, records))],
        smoothing=SMOOTHING,
        activities=dict(zip(ACTIVITIES, _ACTIVITY_COLOURS, strict=True)),
    )


def _facts(record: Record) -> dict[str, str]:
    """Return the values of the summary table for one run, by row name."""
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
        "mean accuracy over classes": score("mean_class"),
        "test examples": str(result.get("examples", _UNKNOWN)),
        "unreadable test examples": str(result.get("missing", _UNKNOWN)),
        "speed": f"{record.rate:.1f} {record.unit}/s" if record.rate else _UNKNOWN,
        "goodput": f"{goodput:.0%}" if seconds else _UNKNOWN,
    }


def _differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the configuration keys that differ between runs, each with the value of every run."""
    configs = [dict(keys_of(as_json(record.config))) for record in records]
    values = {key: [config.get(key) for config in configs] for key in sorted(set().union(*configs))}
    return {f"config.{key}": row for key, row in values.items() if any(value != row[0] for value in row)}


def _section(record: Record, style: LineStyle, hardest: int) -> RunSection:
    predictions = record.predictions
    if predictions is None:
        return RunSection(record, style)
    found = predictions.confident_errors(hardest, record.config.eval.average)
    errors, problem = [ErrorCard(*error) for error in found], ""
    if errors:
        try:
            thumbnails = Thumbnails(record.config)
            errors = [_with_image(card, str(predictions.ids[card.number]), thumbnails) for card in errors]
        except DecodeError as error:
            problem = str(error)
    return RunSection(record, style, predictions.by_class(), confusion_matrix(predictions), errors, problem)


def confusion_matrix(predictions: Predictions) -> Sequence[Sequence[int]] | EmbeddedImage | None:
    """Return counts for a table, an image if there are many classes, or None if there are too many."""
    classes = len(predictions.class_names)
    if classes > _MAX_DRAWN:
        return None
    counts = predictions.confusion()
    return counts.tolist() if classes <= _MAX_TABLE else draw_confusion(counts)


def _with_image(card: ErrorCard, name: str, thumbnails: Thumbnails) -> ErrorCard:
    try:
        return card._replace(image=thumbnails.image(name))
    except DecodeError as error:
        return card._replace(problem=str(error))


class Thumbnails:
    """Read thumbnails of test examples, by example id, as the model of a configuration sees them.

    Raises:
      DecodeError: the data set cannot be opened here; the message has the reason.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        config = config.copy_and_resolve_references()
        config.data.label_maps = ""  # used in training only
        with decoding():
            self._data = data.load(config.data, config.augment, config.train.seed)
        self._indices = {name: index for index, name in enumerate(self._data.test_ids)}
        self._config = config.data

    def pixels(self, name: str) -> np.ndarray:
        """Return an image, or frames of a clip side by side: uint8 [height, width, 3], RGB.

        Raises:
          DecodeError: the example cannot be read, or the data set no longer has it.
        """
        if name not in self._indices:
            raise DecodeError("the example is no longer in the data set")
        view = self._data.test.test(self._indices[name])["inputs"][self._data.test.middle]
        pixels = view
        if self._config.frames:
            pixels = side_by_side(view[evenly_spaced(len(view), _THUMBNAIL_FRAMES)])
        return pixels[..., ::-1] if self._config.channels == "bgr" else pixels

    def image(self, name: str) -> EmbeddedImage:
        """Return the thumbnail of an example.

        Raises:
          DecodeError: as for `pixels`.
        """
        thumbnail = Image.fromarray(np.ascontiguousarray(self.pixels(name)))
        is_small = thumbnail.height <= _THUMBNAIL_HEIGHT
        thumbnail.thumbnail((thumbnail.width, _THUMBNAIL_HEIGHT))
        alt = f"{'frames' if self._config.frames else 'image'} of {name}"
        return EmbeddedImage(html.image_url(np.asarray(thumbnail), lossless=is_small), alt)
