"""Built-in data: 1797 real scans of handwritten digits, as images or in synthetic motion; and random noise.

The scans are the UCI optical digits of scikit-learn (`load_digits`, 8x8 grey). The first 1437 are for
training and the last 360 for testing. Motion, contrast and noise are synthetic.
"""

from __future__ import annotations

import functools
import re

import cv2
import numpy as np

from structvit_jax.data.media import InMemoryFrames
from structvit_jax.data.types import DataOptions
from structvit_jax.utils.errors import UserError

_TRAIN_SCANS = 1437
# Random stream of each split. Validation clips ("tune") show training scans, to keep test scans held out.
_STREAMS = {"train": 0, "test": 1, "tune": 2}


@functools.cache
def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # imported here: it takes a second

    digits = load_digits()
    part = slice(None, _TRAIN_SCANS) if split == "train" else slice(_TRAIN_SCANS, None)
    return digits.images[part].astype(np.float32) / 16.0, digits.target[part]


def _hat(distance: np.ndarray) -> np.ndarray:
    """Return bilinear interpolation weights at distances in pixels."""
    return np.maximum(0.0, 1.0 - np.abs(distance)).astype(np.float32)


def _enlarge(scans: np.ndarray, side: int) -> np.ndarray:
    """Resize square scans [..., old, old] bilinearly to [..., side, side]."""
    old = scans.shape[-1]
    centres = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    weights = _hat(centres[:, None] - np.arange(old))
    return weights @ scans @ weights.T


def _to_rgb(grey: np.ndarray) -> np.ndarray:
    """Convert grey from 0 to 1, [...], to uint8 [..., 3]."""
    pixels = np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)


class _Generated:
    """Examples that are generated on the fly. Example i is drawn from default_rng((*self._entropy, i)).

    Training examples depend on the seed; test examples are the same for every seed.
    """

    name: str

    def __init__(self, split: str, examples: int, seed: int):
        if examples < 1:
            key = f"config.data.{'train' if split == 'train' else 'test'}_examples"
            raise UserError(f"{self.name} is generated on the fly; set {key} to the number of examples")
        self._split, self._examples = split, examples
        self._entropy = (seed if split == "train" else 0, _STREAMS[split])

    def __len__(self) -> int:
        return self._examples

    @property
    def made_from(self) -> str:
        """Identify the examples in a fingerprint."""
        return f"{self.name}, numbers {self._entropy}"

    def id(self, index: int) -> str:
        return f"{self.name}/{self._split}/{index}"


class MovingDigits(_Generated):
    """Clips of one drifting digit; the label is the direction of the drift, in steps of 45 degrees.

    Clip i has label i % 8. The start is uniform and the picture wraps around, so single frames have the same
    distribution in all classes, and classes come in time-reversed pairs. The accuracy is therefore at most
    1/8 from one frame, and 1/2 from unordered frames.
    """

    name = "moving_digits"
    class_names: tuple[str, ...] = tuple(f"{45 * d} degrees" for d in range(8))
    _frames, _side = 8, 24
    _digit = 12  # side of the digit in pixels
    _speed = 0.75, 1.75  # pixels per frame
    _noise = 0.05

    def __init__(self, split: str, examples: int, seed: int):
        super().__init__(split, examples, seed)
        self._scans = _enlarge(_scans("test" if split == "test" else "train")[0], self._digit)

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        rng = np.random.default_rng((*self._entropy, index))
        label = index % len(self.class_names)
        clip = self._clip(rng, label)
        clip += rng.normal(0, self._noise, clip.shape)
        return InMemoryFrames(_to_rgb(clip)), label

    def _clip(self, rng: np.random.Generator, label: int) -> np.ndarray:
        """Return a clip without noise: grey from 0 to 1, [time, height, width]."""
        scan = self._scans[rng.integers(len(self._scans))]
        start = rng.uniform(0, self._side, 2)
        speed = rng.uniform(*self._speed)
        contrast = rng.uniform(0.6, 1.0)
        return contrast * self._placed(scan, start + self._steps(45 * label, speed))

    def _steps(self, degrees: float, speed: float) -> np.ndarray:
        """Return the displacement in each frame, down and to the right: [frames, 2]."""
        angle = np.deg2rad(degrees)
        step = speed * np.array([-np.sin(angle), np.cos(angle)])  # rows grow downwards
        return step * np.arange(self._frames)[:, None]

    def _placed(self, pictures: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """Draw pictures ([frames,] side, side) into frames, wrapped around: [frames, side, side].

        Args:
          pictures: one picture, or one per frame.
          corners: row and column of the top left corner in each frame, [frames, 2].
        """
        side = self._side
        # Distances between the rows (columns) of the frame and those of the picture. The picture repeats
        # every `side` pixels.
        corners = corners[:, :, None, None] % side
        distance = np.arange(side)[:, None] - corners - np.arange(pictures.shape[-1])
        rows, columns = np.moveaxis(_hat(distance) + _hat(distance + side), 1, 0)
        return rows @ pictures @ np.swapaxes(columns, 1, 2)


class DigitMotions(MovingDigits):
    """Harder clips: a rotated digit drifts or turns in place beside a static one, with more noise.

    The label is the direction of the drift or of the turn. Fast clips are easy and slow ones are hard, so
    accuracy rises early in training and can improve for a long time. The first angle and position are
    uniform, so single frames have the same distribution in all classes, and classes come in time-reversed
    pairs.
    """

    name = "digit_motions"
    class_names = (*MovingDigits.class_names, "turning left", "turning right")
    _square = 18  # side in pixels of the square in which a digit turns
    _speed = 0.2, 1.6
    _turn = 2.0, 16.0  # degrees per frame
    _noise = 0.12

    def __init__(self, split: str, examples: int, seed: int):
        super().__init__(split, examples, seed)
        edge = (self._square - self._digit) // 2
        self._scans = np.pad(self._scans, [(0, 0), (edge, edge), (edge, edge)])

    def _clip(self, rng: np.random.Generator, label: int) -> np.ndarray:
        moving = self._moving(rng, label)
        still = self._turned(self._scans[rng.integers(len(self._scans))], rng.uniform(0, 360))
        place = rng.uniform(0, self._side, (1, 2))
        return np.maximum(moving, rng.uniform(0.0, 0.7) * self._placed(still, place))

    def _moving(self, rng: np.random.Generator, label: int) -> np.ndarray:
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

    def _turned(self, square: np.ndarray, degrees: float) -> np.ndarray:
        """Rotate a scan, which is centred in a square, counterclockwise."""
        middle = (self._square - 1) / 2
        turn = cv2.getRotationMatrix2D((middle, middle), degrees, 1.0)
        return cv2.warpAffine(square, turn, square.shape)


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
        self._images = _to_rgb(_enlarge(images, self._side))
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


class Noise(_Generated):
    """Clips or images of random pixels with cyclic labels, to plan runs and to time steps without files.

    config.data.name is "noise:CLASSES". The frames of an example are as many and as large as the
    configuration needs; if the size is not set, they have 64 x 64 pixels.
    """

    name = "noise"

    def __init__(self, data: DataOptions, split: str, seed: int):
        classes = data.name.removeprefix("noise:")
        if not re.fullmatch("[1-9][0-9]{0,5}", classes):
            raise UserError(f"config.data.name is {data.name!r}; write noise:CLASSES, such as noise:400")
        super().__init__(split, data.test_examples if split == "test" else data.train_examples, seed)
        self.class_names = tuple(f"class {number}" for number in range(int(classes)))
        side = max(data.size or 64, data.short_side or 0)
        self._shape = (max(data.frames, 1) * data.stride, side, side, 3)

    @property
    def made_from(self) -> str:
        return f"noise of {len(self.class_names)} classes, numbers {self._entropy}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        pixels = np.random.default_rng((*self._entropy, index)).integers(0, 256, self._shape, np.uint8)
        return InMemoryFrames(pixels), index % len(self.class_names)
