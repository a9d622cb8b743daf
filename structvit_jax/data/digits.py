"""The built-in data: 1797 real scans of handwritten digits, set in motion synthetically.

The scans are the UCI optical digits that scikit-learn carries (`load_digits`, 8x8 grey): the first
1437 are for training, the last 360 for testing. Motion, contrast and noise are made here.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

from structvit_jax.data.media import InMemoryFrames
from structvit_jax.utils.errors import UserError

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


def _enlarge(scans: np.ndarray, side: int) -> np.ndarray:
    """Bilinear resizing of square scans [..., side, side]."""
    old = scans.shape[-1]
    centres = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    weights = _hat(centres[:, None] - np.arange(old))
    return weights @ scans @ weights.T


def _to_rgb(grey: np.ndarray) -> np.ndarray:
    """Grey in 0..1 [...] to uint8 [..., 3]."""
    pixels = np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)


# Of the numbers that clips are made of. Clips to tune on show scans for training, so that tests stay fresh.
_STREAMS = {"train": 0, "test": 1, "tune": 2}


class MovingDigits:
    """Clips of one digit that drifts over a torus; the label is its direction, in steps of 45 degrees.

    Training clip i draws from default_rng((seed, 0, i)), test clip i from default_rng((0, 1, i)) for every
    seed; its label is i % 8. The start is uniform and the picture wraps, so that every single frame looks
    the same for all classes, and classes come in time-reversed pairs: one frame gives 1/8, ignoring the
    order 1/2 at most. The split "tune" is more clips of the scans for training, from default_rng((0, 2, i)).
    """

    name = "moving_digits"
    class_names: tuple[str, ...] = tuple(f"{45 * d} degrees" for d in range(8))
    _frames, _side = 8, 24
    _digit = 12  # its side, in pixels
    _speed = 0.75, 1.75  # pixels a frame
    _noise = 0.05

    def __init__(self, split: str, examples: int, seed: int):
        if examples < 1:
            raise UserError(f"{self.name} are made on the fly: config.data.{split}_examples says how many")
        self._split, self._examples = split, examples
        self._entropy = (seed if split == "train" else 0, _STREAMS[split])
        self._scans = _enlarge(_scans("test" if split == "test" else "train")[0], self._digit)

    def __len__(self) -> int:
        return self._examples

    @property
    def made_from(self) -> str:
        """What examples are made from, for a fingerprint."""
        return f"{self.name}, numbers {self._entropy}"

    def id(self, index: int) -> str:
        return f"{self.name}/{self._split}/{index}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        rng = np.random.default_rng((*self._entropy, index))
        label = index % len(self.class_names)
        clip = self._clip(rng, label)
        clip += rng.normal(0, self._noise, clip.shape)
        return InMemoryFrames(_to_rgb(clip)), label

    def _clip(self, rng: np.random.Generator, label: int) -> np.ndarray:
        """Grey in 0..1 [time, height, width], without noise."""
        scan = self._scans[rng.integers(len(self._scans))]
        start = rng.uniform(0, self._side, 2)
        speed = rng.uniform(*self._speed)
        contrast = rng.uniform(0.6, 1.0)
        return contrast * self._placed(scan, start + self._steps(45 * label, speed))

    def _steps(self, degrees: float, speed: float) -> np.ndarray:
        """[frames, 2]: how far down and to the right what drifts has come in each frame."""
        angle = np.deg2rad(degrees)
        step = speed * np.array([-np.sin(angle), np.cos(angle)])  # rows grow downwards
        return step * np.arange(self._frames)[:, None]

    def _placed(self, pictures: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """Pictures [side, side], or one for each frame, at corners [frames, 2], wrapped: [frames, ...]."""
        side = self._side
        # Distance from every row (column) of the frame to every row (column) of the picture; a frame further
        # there is the same picture again.
        corners = corners[:, :, None, None] % side
        distance = np.arange(side)[:, None] - corners - np.arange(pictures.shape[-1])
        rows, columns = np.moveaxis(_hat(distance) + _hat(distance + side), 1, 0)
        return rows @ pictures @ np.swapaxes(columns, 1, 2)


class DigitMotions(MovingDigits):
    """Harder: a digit, turned any way, drifts or turns in place, beside another that lies still, in more
    noise. The label is the drift's direction, or which way it turns. Fast clips are easy and slow ones hard,
    so that models learn something soon and have something left to learn.

    Every clip starts with a digit turned by a uniform angle at a uniform place, so that single frames look
    the same for all classes; they come in time-reversed pairs.
    """

    name = "digit_motions"
    class_names = (*MovingDigits.class_names, "turning left", "turning right")
    _square = 18  # side of the square in which a digit turns, in pixels
    _speed = 0.2, 1.6
    _turn = 2.0, 16.0  # degrees a frame
    _noise = 0.12

    def __init__(self, split: str, examples: int, seed: int):
        super().__init__(split, examples, seed)
        edge = (self._square - self._digit) // 2
        self._scans = np.pad(self._scans, [(0, 0), (edge, edge), (edge, edge)])

    def _clip(self, rng, label):
        moving = self._turned_any_way(rng, label)
        still = self._turned(self._scans[rng.integers(len(self._scans))], rng.uniform(0, 360))
        place = rng.uniform(0, self._side, (1, 2))
        return np.maximum(moving, rng.uniform(0.0, 0.7) * self._placed(still, place))

    def _turned_any_way(self, rng, label):
        scan, start = self._scans[rng.integers(len(self._scans))], rng.uniform(0, self._side, 2)
        angle, turn, speed = rng.uniform(0, 360), rng.uniform(*self._turn), rng.uniform(*self._speed)
        if label < len(MovingDigits.class_names):
            pictures, corners = self._turned(scan, angle), start + self._steps(45 * label, speed)
        else:
            turn *= (1, -1)[label - len(MovingDigits.class_names)]
            angles = angle + turn * np.arange(self._frames)
            pictures = np.stack([self._turned(scan, angle) for angle in angles])
            corners = start + self._steps(0, 0.0)
        return rng.uniform(0.6, 1.0) * self._placed(pictures, corners)

    def _turned(self, square, degrees):
        """The scan in the middle of a square, turned counterclockwise."""
        middle = (self._square - 1) / 2
        turn = cv2.getRotationMatrix2D((middle, middle), degrees, 1.0)
        return cv2.warpAffine(square, turn, square.shape)


class Digits:
    """The scans as images of 32x32, classes 0 to 9."""

    class_names = tuple(map(str, range(10)))
    _side = 32

    def __init__(self, split: str, examples: int, seed: int):
        del examples, seed  # as many as there are scans, the same for every seed
        self._split = split
        images, labels = _scans(split)
        self._images = _to_rgb(_enlarge(images, self._side))
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labels(self) -> np.ndarray:
        """Places among the class names."""
        return np.array(self._labels)

    @property
    def made_from(self) -> str:
        """What examples are made from, for a fingerprint."""
        return "digits"

    def id(self, index: int) -> str:
        return f"digits/{self._split}/{index}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        return InMemoryFrames(self._images[index][None]), self._labels[index]
