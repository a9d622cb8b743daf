"""A run's classes: how each fared, and what it was taken for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from structvit_jax.analysis.report.charts import confusion
from structvit_jax.analysis.report.markup import Markup, joined, scrolling, table, tag
from structvit_jax.analysis.report.predictions import ClassScore, Predictions

WORST, BEST = 20, 5  # classes that are always shown
COUNTED, DRAWN = 20, 1000  # the most classes of a matrix in numbers, and in colour


def class_sections(predictions: Predictions) -> Iterator[Markup]:
    """Accuracy by class, and the confusion matrix."""
    scores = predictions.by_class()
    yield tag("h3", "Accuracy by class, the worst first")
    lacking = len(predictions.class_names) - len(scores)
    if lacking:
        yield tag("p", f"{lacking} of {len(predictions.class_names)} classes have no example.", class_="note")
    yield from _folded(scores, predictions.class_names)
    yield tag("h3", "Confusion")
    yield _matrix(predictions)
    if unclear := int((predictions.found < 0).sum()):
        yield tag(
            "p", f"{unclear} examples have NaN among their scores: wrong, and not in it.", class_="note"
        )


def _folded(scores: Sequence[ClassScore], names: Sequence[str]) -> Iterator[Markup]:
    """All classes, of many those between the worst and the best folded away."""
    between = scores[WORST:-BEST]
    if not between:
        yield _accuracies("accuracy by class", scores, names)
        return
    yield _accuracies(f"the {WORST} worst classes", scores[:WORST], names)
    title = tag("summary", f"{len(between)} classes between these and the {BEST} best")
    yield tag("details", title, _accuracies("classes between", between, names))
    yield _accuracies(f"the {BEST} best classes", scores[-BEST:], names)


def _accuracies(label: str, scores: Sequence[ClassScore], names: Sequence[str]) -> Markup:
    head = ("class", "accuracy", tag("th", "most often taken for", class_="words"), "examples", "no.")
    rows = []
    for score in scores:
        bar = tag("span", tag("span", style=f"width:{score.accuracy:.1%}"), class_="share")
        other = (
            "" if score.confused is None else f"{names[score.confused]}: {score.times} of {score.examples}"
        )
        accuracy = joined([f"{score.accuracy:.3f}", bar])
        words = tag("td", other, class_="words")
        rows.append((names[score.number], accuracy, words, score.examples, score.number))
    return table(label, head, rows, class_="classes")


def _matrix(predictions: Predictions) -> Markup:
    names = predictions.class_names
    if len(names) > DRAWN:
        return tag("p", f"Not drawn: {len(names)} classes are more than {DRAWN}.", class_="note")
    counts = predictions.confusion()
    if len(names) > COUNTED:
        said = "Colour is the share of a row; the numbers of the classes are those of the tables above."
        figure = tag("figure", confusion(counts), tag("figcaption", said, class_="quiet"), class_="matrix")
        return scrolling("confusion matrix", figure)
    said = (
        "Rows are true classes, columns predictions; cells count examples, colour is their share of the row."
    )
    rows = [(name, *_cells(number, counts[number], names)) for number, name in enumerate(names)]
    shown = table("confusion matrix", ["true \\ predicted", *names], rows, class_="matrix")
    return joined([tag("p", said, class_="quiet"), shown])


def _cells(true: int, counts: np.ndarray, names: Sequence[str]) -> Iterator[Markup]:
    """One row of the matrix."""
    total = max(int(counts.sum()), 1)
    for number, count in enumerate(counts.tolist()):
        share = count / total
        kinds = {"right": number == true, "none": not count, "strong": share > 0.9}
        yield tag(
            "td",
            count,
            class_=" ".join(kind for kind, holds in kinds.items() if holds) or None,
            style=f"background:rgb(var(--blue) / {share:.3f})" if count else None,
            title=f"true {names[true]}, predicted {names[number]}: {count} of {total}",
        )
