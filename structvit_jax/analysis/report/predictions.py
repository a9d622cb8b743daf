"""What a model said of the test examples, and where it was wrong."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from etils import epath

from structvit_jax.training.evaluation import probabilities
from structvit_jax.utils.errors import DecodeError, UserError, decoding

_LARGEST = 2**33  # bytes of the arrays in a file
_ROWS = 1024  # of scores that are looked at together, to bound memory


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
        highest = self.scores.argmax(axis=1)  # of a row with NaN, a NaN
        return np.where(np.isnan(self.scores[np.arange(len(highest)), highest]), -1, highest)

    def confusion(self) -> np.ndarray:
        """Count how many examples of each class (rows) were taken for each (columns), without those with NaN.

        The matrix is dense: for few classes only.
        """
        classes, found = len(self.class_names), self.found
        pairs = (self.labels * classes + found)[found >= 0]
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def by_class(self) -> list[ClassScore]:
        """Every class that has examples, the worst first, and of equal ones the largest."""
        classes, found = len(self.class_names), self.found
        examples = np.bincount(self.labels, minlength=classes)
        right = np.bincount(self.labels[found == self.labels], minlength=classes)
        wrong = (found >= 0) & (found != self.labels)
        pairs, counts = np.unique(
            self.labels[wrong].astype(np.int64) * classes + found[wrong], return_counts=True
        )
        confused: dict[int, tuple[int, int]] = {}  # the class that each was most often taken for; how often
        for pair, times in zip(pairs.tolist(), counts.tolist(), strict=True):
            true, other = divmod(pair, classes)
            if times > confused.get(true, (0, 0))[1]:
                confused[true] = other, times
        scores = []
        for number in np.flatnonzero(examples).tolist():
            other, times = confused.get(number, (None, 0))
            scores.append(ClassScore(number, int(examples[number]), int(right[number]), other, times))
        return sorted(scores, key=lambda score: (score.accuracy, -score.examples))

    def hardest(self, count: int, average: str) -> list[tuple[int, np.ndarray]]:
        """The wrong examples of which the model was surest, surest first, and their probabilities [classes].

        `average` is what config.eval.average says the scores are means of: "logits" or "softmax".
        """
        found = self.found
        wrong = np.flatnonzero((found >= 0) & (found != self.labels))
        highest = np.empty(len(wrong))
        for start in range(0, len(wrong), _ROWS):
            rows = slice(start, start + _ROWS)
            highest[rows] = self._probabilities(wrong[rows], average).max(axis=1)
        surest = wrong[np.argsort(-highest, kind="stable")[:count]]
        return list(zip(surest.tolist(), self._probabilities(surest, average), strict=True))

    def _probabilities(self, rows: np.ndarray, average: str) -> np.ndarray:
        return probabilities(self.scores[rows].astype(np.float64), average)


def read_predictions(path: epath.Path) -> Predictions:
    """What an evaluation wrote.

    Raises:
      UserError: a file that is damaged or was not written by us.
      OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        with decoding(), np.load(io.BytesIO(content)) as arrays:
            if sum(entry.file_size for entry in arrays.zip.infolist()) > _LARGEST:
                raise DecodeError(f"its arrays take more than {_LARGEST >> 30} GiB")
            ids, labels, scores, names = (arrays[key] for key in ("ids", "labels", "scores", "class_names"))
            if not scores.shape == (len(ids), len(names)) == (len(labels), len(names)):
                raise DecodeError(f"{len(ids)} ids, {len(names)} classes and scores of {scores.shape}")
            if scores.dtype.kind != "f":
                raise DecodeError(f"scores of {scores.dtype}")
            if not -1 <= labels.min(initial=0) <= labels.max(initial=0) < len(names):
                raise DecodeError(f"a label that is none of its {len(names)} classes")
    except DecodeError as error:
        raise UserError(
            f"{path} is damaged: {error}. Evaluate again, with structvit evaluate {path.parent}"
            f" --out={path.parent}, or remove it"
        ) from error
    seen = labels >= 0
    class_names = tuple(map(str, names))
    return Predictions(ids[seen], labels[seen], scores[seen], class_names, int((~seen).sum()))
