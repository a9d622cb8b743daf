"""Predictions of an evaluation: results by class, the confusion matrix and the most confident errors."""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import NamedTuple

import numpy as np
from etils import epath
from scipy.sparse import csr_array

from structvit_jax.training.evaluation import probabilities
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, decoding

_MAX_BYTES = 2**33  # of the arrays in a file


class ClassScore(NamedTuple):
    """Results of one class."""

    number: int  # index of the class
    examples: int
    right: int
    confused: int | None  # the wrong class that was predicted most often; None if there are no errors
    times: int  # how often the class `confused` was predicted

    @property
    def accuracy(self) -> float:
        return self.right / self.examples


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of the readable examples; see `structvit_jax.training.evaluation.Evaluation`."""

    ids: np.ndarray  # str [examples]
    labels: np.ndarray  # int [examples]
    scores: np.ndarray  # float [examples, classes]
    class_names: tuple[str, ...]

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Predicted classes [examples]. Of equal scores, the first wins; -1 if a score is NaN."""
        best = self.scores.argmax(axis=1)  # if there is a NaN, argmax returns its index
        return np.where(np.isnan(self.scores[np.arange(len(best)), best]), -1, best)

    @property
    def undefined(self) -> int:
        """The number of examples with NaN scores."""
        return int((self.predicted < 0).sum())

    def confusion(self) -> np.ndarray:
        """Return the confusion matrix: counts [true, predicted] of the examples without NaN scores.

        It is dense: 10,000 classes take 800 MB.
        """
        classes, counted = len(self.class_names), self.predicted >= 0
        pairs = (self.labels * classes + self.predicted)[counted]
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def by_class(self) -> list[ClassScore]:
        """Return the results of all classes that have examples: lowest accuracy first, then most examples."""
        classes, predicted = len(self.class_names), self.predicted
        examples = np.bincount(self.labels, minlength=classes)
        right = np.bincount(self.labels[predicted == self.labels], minlength=classes)
        wrong = (predicted >= 0) & (predicted != self.labels)
        pairs, ones = (self.labels[wrong], predicted[wrong]), np.ones(wrong.sum(), int)
        confusions = csr_array((ones, pairs), shape=(classes, classes))  # adds up equal pairs
        confused, times = confusions.argmax(axis=1).tolist(), confusions.max(axis=1).toarray().tolist()
        scores = [
            ClassScore(i, int(examples[i]), int(right[i]), confused[i] if times[i] else None, times[i])
            for i in np.flatnonzero(examples).tolist()
        ]
        return sorted(scores, key=lambda score: (score.accuracy, -score.examples))

    def confident_errors(self, count: int, average: str) -> list[tuple[int, np.ndarray]]:
        """Return the indices and probabilities [classes] of the most confident errors, in descending order.

        Args:
          count: maximum number of errors.
          average: config.eval.average, which is "logits" or "softmax": what the scores are means of.
        """
        wrong = np.flatnonzero((self.predicted >= 0) & (self.predicted != self.labels))
        found = probabilities(self.scores[wrong].astype(np.float64), average)
        order = np.argsort(-found.max(axis=1), kind="stable")[:count]
        return list(zip(wrong[order].tolist(), found[order], strict=True))


def read_predictions(path: epath.Path) -> Predictions:
    """Read the predictions that an evaluation saved, without unreadable examples.

    Raises:
      UserError: the file is damaged, or was not written by an evaluation.
      OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        with decoding(), np.load(io.BytesIO(content)) as arrays:
            if sum(entry.file_size for entry in arrays.zip.infolist()) > _MAX_BYTES:
                raise DecodeError(f"its arrays take more than {_MAX_BYTES >> 30} GiB")
            ids, labels, scores, names = (arrays[key] for key in ("ids", "labels", "scores", "class_names"))
            if not scores.shape == (len(ids), len(names)) == (len(labels), len(names)):
                raise DecodeError(
                    f"it has {len(ids)} ids, {len(names)} classes, and scores of shape {scores.shape}"
                )
            if scores.dtype.kind != "f":
                raise DecodeError(f"its scores are of type {scores.dtype}")
            if not -1 <= labels.min(initial=0) <= labels.max(initial=0) < len(names):
                raise DecodeError(f"a label is not one of its {len(names)} classes")
    except DecodeError as error:
        raise UserError(
            f"{path} is damaged: {error}. Remove it, or evaluate again with"
            f" structvit evaluate {path.parent} --out={path.parent}"
        ) from error
    readable = labels >= 0
    return Predictions(ids[readable], labels[readable], scores[readable], tuple(map(str, names)))
