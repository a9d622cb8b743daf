"""Synthetic motion: pictures that drift or turn. The label is the motion."""

from __future__ import annotations

import cv2
import numpy as np

from structvit_jax.data.generated import Generated
from structvit_jax.data.media import InMemoryFrames, grey_to_rgb


def hat(distance: np.ndarray) -> np.ndarray:
    """Return bilinear interpolation weights at distances in pixels."""
    return np.maximum(0.0, 1.0 - np.abs(distance)).astype(np.float32)


class Drift(Generated):
    """Clips of one drifting picture, the sprite. The label is the direction, in steps of 45 degrees.

    Clip i has label i % 8. The start is uniform and the picture wraps around, so single frames have the same
    distribution in all classes, and classes come in time-reversed pairs. The accuracy is therefore at most
    1/8 from one frame, and 1/2 from unordered frames.

    Args:
      sprites: float32 [sprites, side, side], grey from 0 to 1. Frames are twice as high and wide.
      split, examples, seed: see `Generated`.
      origin: identifies the sprites in a fingerprint, if `name` and the split do not.
    """

    class_names: tuple[str, ...] = tuple(f"{45 * d} degrees" for d in range(8))
    _frames = 8
    _speed = 0.75, 1.75  # pixels per frame
    _noise = 0.05

    def __init__(self, sprites: np.ndarray, split: str, examples: int, seed: int, origin: str = ""):
        super().__init__(split, examples, seed)
        self._sprites, self._origin, self._side = sprites, origin, 2 * sprites.shape[-1]

    @property
    def made_from(self) -> str:
        made_from = super().made_from
        return f"{made_from}, {self._origin}" if self._origin else made_from

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        rng = np.random.default_rng((*self._entropy, index))
        label = index % len(self.class_names)
        clip = self._clip(rng, label)
        clip += rng.normal(0, self._noise, clip.shape)
        return InMemoryFrames(grey_to_rgb(clip)), label

    def _clip(self, rng: np.random.Generator, label: int) -> np.ndarray:
        """Return a clip without noise: grey from 0 to 1, [time, height, width]."""
        sprite = self._draw(rng)
        start = rng.uniform(0, self._side, 2)
        speed = rng.uniform(*self._speed)
        contrast = rng.uniform(0.6, 1.0)
        return contrast * self._placed(sprite, start + self._steps(45 * label, speed))

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random sprite: grey from 0 to 1, [side, side]."""
        return self._sprites[rng.integers(len(self._sprites))]

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
        rows, columns = np.moveaxis(hat(distance) + hat(distance + side), 1, 0)
        return rows @ pictures @ np.swapaxes(columns, 1, 2)


class DriftOrTurn(Drift):
    """Harder clips: a rotated sprite drifts or turns in place beside a static one, with more noise.

    The label is the direction of the drift or of the turn. Fast clips are easy and slow ones are hard, so
    accuracy rises early in training and can improve for a long time. The first angle and position are
    uniform, so single frames have the same distribution in all classes, and classes come in time-reversed
    pairs.
    """

    class_names = (*Drift.class_names, "turning left", "turning right")
    _speed = 0.2, 1.6
    _turn = 2.0, 16.0  # degrees per frame
    _noise = 0.12

    def _clip(self, rng: np.random.Generator, label: int) -> np.ndarray:
        moving = self._moving(rng, label)
        still = self._turned(self._draw(rng), rng.uniform(0, 360))
        place = rng.uniform(0, self._side, (1, 2))
        return np.maximum(moving, rng.uniform(0.0, 0.7) * self._placed(still, place))

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random sprite in a square that has room for its corners: 3/2 of its side."""
        sprite = super()._draw(rng)
        edge, side = len(sprite) // 4, len(sprite)
        square = np.zeros((side + 2 * edge, side + 2 * edge), sprite.dtype)
        square[edge : edge + side, edge : edge + side] = sprite
        return square

    def _moving(self, rng: np.random.Generator, label: int) -> np.ndarray:
        sprite, start = self._draw(rng), rng.uniform(0, self._side, 2)
        angle, turn, speed = rng.uniform(0, 360), rng.uniform(*self._turn), rng.uniform(*self._speed)
        if label < len(Drift.class_names):
            pictures, corners = self._turned(sprite, angle), start + self._steps(45 * label, speed)
        else:
            turn *= (1, -1)[label - len(Drift.class_names)]
            angles = angle + turn * np.arange(self._frames)
            pictures = np.stack([self._turned(sprite, angle) for angle in angles])
            corners = start + self._steps(0, 0.0)
        return rng.uniform(0.6, 1.0) * self._placed(pictures, corners)

    def _turned(self, square: np.ndarray, degrees: float) -> np.ndarray:
        """Rotate a square picture counterclockwise."""
        middle = (len(square) - 1) / 2
        turn = cv2.getRotationMatrix2D((middle, middle), degrees, 1.0)
        return cv2.warpAffine(square, turn, square.shape)
