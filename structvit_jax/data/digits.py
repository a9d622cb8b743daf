"""Built-in data: 1797 real scans of handwritten digits, as images or in synthetic motion.

The scans are the UCI optical digits of scikit-learn (`load_digits`, 8x8 grey). The first 1437 are for
training and the last 360 for testing. Motion, contrast and noise are synthetic. Validation clips ("tune")
show training scans.
"""

from __future__ import annotations

import functools

import numpy as np

from structvit_jax.data.media import InMemoryFrames, grey_to_rgb
from structvit_jax.data.motion import Drift, DriftOrTurn, hat
from structvit_jax.utils.errors import UserError

_TRAIN_SCANS = 1437
_MOVING_SIDE = 12  # of a digit that moves, in pixels


@functools.cache
def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # imported here: it takes a second

    digits = load_digits()
    part = slice(None, _TRAIN_SCANS) if split == "train" else slice(_TRAIN_SCANS, None)
    return digits.images[part].astype(np.float32) / 16.0, digits.target[part]


def _enlarge(scans: np.ndarray, side: int) -> np.ndarray:
    """Resize square scans [..., old, old] bilinearly to [..., side, side]."""
    old = scans.shape[-1]
    centres = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    weights = hat(centres[:, None] - np.arange(old))
    return weights @ scans @ weights.T


def _sprites(split: str) -> np.ndarray:
    """Return the scans that clips of a split show: float32 [scans, side, side], grey from 0 to 1."""
    return _enlarge(_scans("test" if split == "test" else "train")[0], _MOVING_SIDE)


class MovingDigits(Drift):
    """Clips of one drifting digit, 8 frames of 24 x 24 pixels; see `Drift`."""

    name = "moving_digits"

    def __init__(self, split: str, examples: int, seed: int):
        super().__init__(_sprites(split), split, examples, seed)


class DigitMotions(DriftOrTurn):
    """Clips of a digit that drifts or turns, 8 frames of 24 x 24 pixels; see `DriftOrTurn`."""

    name = "digit_motions"

    def __init__(self, split: str, examples: int, seed: int):
        super().__init__(_sprites(split), split, examples, seed)


class Digits:
    """The scans as images of 32 x 32 pixels, with classes 0 to 9."""

    class_names = tuple(map(str, range(10)))
    _side = 32

    def __init__(self, split: str, examples: int, seed: int):
        del examples, seed  # always all scans
        if split == "tune":
            raise UserError("digits has no validation split 'tune'; it has 'train' and 'val' only")
        self._split = split
        images, labels = _scans(split)
        self._images = grey_to_rgb(_enlarge(images, self._side))
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labels(self) -> np.ndarray:
        """int [examples], positions in `class_names`."""
        return np.array(self._labels)

    @property
    def made_from(self) -> str:
        """Identify the examples in a fingerprint."""
        return "digits"

    def id(self, index: int) -> str:
        return f"digits/{self._split}/{index}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        return InMemoryFrames(self._images[index][None]), self._labels[index]
