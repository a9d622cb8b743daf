"""The built-in data: 1797 real scans of handwritten digits, set in motion synthetically.

The scans are the UCI optical digits that scikit-learn carries (`load_digits`, 8x8 grey): the first
1437 are for training, the last 360 for testing. Motion, contrast and noise are made here.
"""

from __future__ import annotations

import functools

import numpy as np

from structvit_jax.data.media import Decoded
from structvit_jax.errors import UserError

_TRAIN_SCANS = 1437


@functools.cache
def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # imported here: it takes a second

    digits = load_digits()
    part = slice(None, _TRAIN_SCANS) if split == "train" else slice(_TRAIN_SCANS, None)
    return digits.images[part].astype(np.float32) / 16.0, digits.target[part]


def _hat(distance: np.ndarray) -> np.ndarray:
    """The weight of bilinear interpolation at a distance in pixels."""
    return np.maximum(0.0, 1.0 - np.abs(distance)).astype(np.float32)


def _enlarge(scan: np.ndarray, side: int) -> np.ndarray:
    """Bilinear resizing of a square scan."""
    old = len(scan)
    centres = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    weights = _hat(centres[:, None] - np.arange(old))
    return weights @ scan @ weights.T


def _to_rgb(grey: np.ndarray) -> np.ndarray:
    """Grey in 0..1 [...] to uint8 [..., 3]."""
    pixels = np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)


class MovingDigits:
    """Clips of one digit that drifts over a torus; the label is its direction, in steps of 45 degrees.

    Training clip i draws from default_rng((seed, 0, i)), test clip i from default_rng((0, 1, i)) for every
    seed; its label is i % 8. The start is uniform and the picture wraps, so that every single frame looks
    the same for all classes, and classes come in time-reversed pairs: one frame gives 1/8, ignoring the
    order 1/2 at most.
    """

    class_names = tuple(f"{45 * d} degrees" for d in range(8))
    _frames, _side = 8, 24
    _digit = 12  # its side, in pixels

    def __init__(self, split: str, examples: int, seed: int):
        if examples < 1:
            raise UserError(f"moving_digits are made on the fly: config.data.{split}_examples says how many")
        self._split, self._examples = split, examples
        self._entropy = (seed, 0) if split == "train" else (0, 1)
        self._scans = [_enlarge(scan, self._digit) for scan in _scans(split)[0]]

    def __len__(self) -> int:
        return self._examples

    def id(self, index: int) -> str:
        return f"moving_digits/{self._split}/{index}"

    def open(self, index: int) -> tuple[Decoded, int]:
        frames, side = self._frames, self._side
        rng = np.random.default_rng((*self._entropy, index))
        label = index % len(self.class_names)
        scan = self._scans[rng.integers(len(self._scans))]
        start = rng.uniform(0, side, 2)
        speed = rng.uniform(0.75, 1.75)  # pixels a frame
        contrast = rng.uniform(0.6, 1.0)
        angle = np.deg2rad(45 * label)
        step = speed * np.array([-np.sin(angle), np.cos(angle)])  # rows grow downwards
        corners = start + step * np.arange(frames)[:, None]  # [frame, axis]
        # Distance from every row (column) of the picture to every row (column) of the digit, wrapped.
        distance = np.arange(side)[:, None] - corners[:, :, None, None] - np.arange(self._digit)
        rows, columns = np.moveaxis(_hat((distance + side / 2) % side - side / 2), 1, 0)
        clip = contrast * (rows @ scan @ np.swapaxes(columns, 1, 2))
        clip += rng.normal(0, 0.05, clip.shape)
        return Decoded(_to_rgb(clip)), label


class Digits:
    """The scans as images of 32x32, classes 0 to 9."""

    class_names = tuple(map(str, range(10)))
    _side = 32

    def __init__(self, split: str, examples: int, seed: int):
        del examples, seed  # as many as there are scans, the same for every seed
        self._split = split
        images, labels = _scans(split)
        self._images = [_to_rgb(_enlarge(image, self._side)) for image in images]
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def id(self, index: int) -> str:
        return f"digits/{self._split}/{index}"

    def open(self, index: int) -> tuple[Decoded, int]:
        return Decoded(self._images[index][None]), self._labels[index]
