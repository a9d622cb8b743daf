"""The examples of which a model was surest, and wrong."""

from __future__ import annotations

import numpy as np

from structvit_jax.analysis.report.markup import Markup, joined, tag
from structvit_jax.analysis.report.predictions import Predictions
from structvit_jax.analysis.report.record import Record
from structvit_jax.analysis.report.thumbnails import Thumbnails
from structvit_jax.utils.errors import DecodeError


def hardest_section(record: Record, predictions: Predictions, count: int) -> Markup:
    """Thumbnails of the surest mistakes; where the data cannot be opened here, what is known without."""
    title = tag("h3", "Hardest examples: wrong, and the model was sure")
    found = predictions.hardest(count, record.config.eval.average)
    if not found:
        return joined([title, tag("p", "No example is wrong." if count else "None were asked for.")])
    notes, thumbnails = [], None
    try:
        thumbnails = Thumbnails(record.config)
    except DecodeError as error:
        notes = [tag("p", f"No pictures, since the data cannot be opened here: {error}", class_="note")]
    cards = []
    for place, probabilities in found:
        name = str(predictions.ids[place])
        words = _caption(name, int(predictions.labels[place]), probabilities, predictions.class_names)
        shown = [_picture(thumbnails, name)] if thumbnails else []
        cards.append(tag("li", tag("figure", *shown, tag("figcaption", *words))))
    return joined([title, *notes, tag("ol", *cards, class_=f"cards {record.unit}")])


def _picture(thumbnails: Thumbnails, name: str) -> Markup:
    try:
        return thumbnails(name)
    except DecodeError as error:
        return tag("p", f"No picture: {error}", class_="note")


def _caption(
    name: str, label: int, probabilities: np.ndarray, names: tuple[str, ...]
) -> tuple[Markup, Markup]:
    """The example's id, and what it is and was taken for, each with its probability."""
    found = int(probabilities.argmax())
    terms = [
        part
        for word, number in (("predicted", found), ("true", label))
        for part in (tag("dt", word), tag("dd", names[number]), tag("dd", f"{probabilities[number]:.4f}"))
    ]
    return tag("code", name), tag("dl", *terms)
