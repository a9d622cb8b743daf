"""What a model said of the test examples, and where it was wrong."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from etils import epath

from structvit_jax.errors import DecodeError, UserError, decoding
from structvit_jax.training.evaluation import probabilities


class ClassScore(NamedTuple):
    """How one class fared."""

    number: int
    examples: int
    right: int
    confused: int | None  # the class that its examples were most often taken for; None if all were right
    times: int  # ... and how often

    @property
    def accuracy(self) -> float:
        return self.right / self.examples


class Predictions(NamedTuple):
    """Scores of examples that were read; see `structvit_jax.training.evaluation.Evaluation`."""

    ids: np.ndarray  # str [examples]
    labels: np.ndarray  # int [examples]
    scores: np.ndarray  # float [examples, classes]
    class_names: tuple[str, ...]
    unreadable: int  # further examples, which have no scores

    @property
    def found(self) -> np.ndarray:
        """The class [examples] with the highest score, of equal ones the first; -1 where a score is NaN."""
        return np.where(np.isnan(self.scores).any(axis=1), -1, self.scores.argmax(axis=1))

    def confusion(self) -> np.ndarray:
        """How many examples of each class (rows) were taken for each (columns); those with NaN are not."""
        classes, found = len(self.class_names), self.found
        pairs = (self.labels * classes + found)[found >= 0]
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def by_class(self) -> list[ClassScore]:
        """Every class that has examples, the worst first, and of equal ones the largest."""
        confusion = self.confusion()
        examples = np.bincount(self.labels, minlength=len(self.class_names))
        wrong = confusion * ~np.eye(len(confusion), dtype=bool)
        confused = wrong.argmax(axis=1)
        scores = []
        for number in np.flatnonzero(examples).tolist():
            other = int(confused[number])
            times = int(wrong[number, other])
            right = int(confusion[number, number])
            scores.append(ClassScore(number, int(examples[number]), right, other if times else None, times))
        return sorted(scores, key=lambda score: (score.accuracy, -score.examples))

    def hardest(self, count: int, average: str) -> list[tuple[int, np.ndarray]]:
        """The wrong examples of which the model was surest, surest first, and their probabilities [classes].

        `average` is what config.eval.average says the scores are means of: "logits" or "softmax".
        """
        found = self.found
        wrong = np.flatnonzero((found >= 0) & (found != self.labels))
        if not len(wrong):
            return []
        shares = probabilities(self.scores[wrong].astype(np.float64), average)
        surest = np.argsort(-shares.max(axis=1), kind="stable")[:count]
        return [(int(wrong[place]), shares[place]) for place in surest]


def read_predictions(path: epath.Path) -> Predictions:
    """What an evaluation wrote.

    Raises:
      UserError: a file that is damaged or was not written by us.
      OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        with decoding(), np.load(io.BytesIO(content)) as arrays:
            ids, labels, scores, names = (arrays[key] for key in ("ids", "labels", "scores", "class_names"))
            if not scores.shape == (len(ids), len(names)) == (len(labels), len(names)):
                raise DecodeError(f"{len(ids)} ids, {len(names)} classes and scores of {scores.shape}")
            if not -1 <= labels.min(initial=0) <= labels.max(initial=0) < len(names):
                raise DecodeError(f"a label that is none of its {len(names)} classes")
    except DecodeError as error:
        raise UserError(
            f"{path} is damaged: {error}. Evaluate again, with python -m structvit_jax.evaluate {path.parent}"
            f" --out={path.parent}, or remove it"
        ) from error
    seen = labels >= 0
    class_names = tuple(map(str, names))
    return Predictions(ids[seen], labels[seen], scores[seen], class_names, int((~seen).sum()))
