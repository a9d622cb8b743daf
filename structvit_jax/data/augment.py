"""Crops, flips, RandAugment and colour jitter on the host.

A clip is uint8 [time, height, width, 3]; an image is a clip of one frame. All frames of a clip are
augmented in the same way. Everything random is drawn first, so that `structvit_jax.data.operations` computes
only the pixels that the crop needs. Erasing, mixup and cutmix run on the device, see
`structvit_jax.training.mixing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from structvit_jax.data import operations, pixels
from structvit_jax.data.operations import Operation
from structvit_jax.data.pixels import Box, Fill
from structvit_jax.utils.errors import UserError

# float64 [3, 3]: maps a point (x, y, 1) of the output to the point of the input that is shown there. Both are
# in fractions of the width and height.
CropAffine = np.ndarray
_MIRRORED: CropAffine = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])


def resize(
    frame: np.ndarray, size: tuple[int, int], *, image: bool, mirrored: bool = False
) -> np.ndarray:
    """Resize a frame, uint8 [height, width, 3], to `size` (height, width), and mirror it on request.

    Images are resized bicubically with antialiasing, as in timm with Pillow. Frames of clips are resized
    bilinearly without antialiasing, as in UniFormer with torch's `interpolate`, and rounded to whole values.
    """
    if frame.shape[:2] != size:
        if image:
            frame = pixels.resample(frame, size)
        else:
            frame = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.flip(frame, 1) if mirrored else frame


def random_box(
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draw a box with a uniform fraction of the area and a log-uniform aspect ratio (width / height).

    If ten drawn boxes do not fit, return the largest centred box whose aspect ratio is in range, as in
    torchvision.
    """
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(*np.log(aspect)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
            return int(top), int(left), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


class RandomCrop(NamedTuple):
    """A random crop: a box of the frame, which may be mirrored.

    Attributes:
      box: top, left, height, width in pixels.
      mirrored: whether left and right are exchanged.
      affine: the affine map from the crop to the frame.
    """

    box: Box
    mirrored: bool
    affine: CropAffine


def draw_crop(
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    rng: np.random.Generator,
) -> RandomCrop:
    """Draw a random crop of frames of this size (height, width), mirrored with probability `flip`."""
    height, width = size
    top, left, h, w = box = random_box(height, width, area, aspect, rng)
    affine = np.array([[w / width, 0, left / width], [0, h / height, top / height], [0, 0, 1]])
    mirrored = rng.random() < flip
    return RandomCrop(box, mirrored, affine @ _MIRRORED if mirrored else affine)


def test_crops(clip: np.ndarray, size: int, fraction: float, crops: int, *, image: bool) -> np.ndarray:
    """Return the test crops of a clip, see `test_boxes`: uint8 [crops, time, size, size, 3]."""
    height, width = clip.shape[1:3]
    new, corners = test_boxes(height, width, size, fraction, crops, image=image)
    frames = [resize(frame, new, image=image) for frame in clip]
    return np.stack([[f[top : top + size, left : left + size] for f in frames] for top, left in corners])


def test_boxes(
    height: int, width: int, size: int, fraction: float, crops: int, *, image: bool
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the (height, width) that frames are scaled to for testing, and the (top, left) of each crop.

    The short side is scaled to size / fraction, and crops are size x size. A single crop is the centre. Three
    crops are left, centre and right; of portrait frames, top, centre and bottom.
    """
    short = int(size / fraction)
    # The long side is rounded down, as in UniFormer and torchvision.
    new = (short, short * width // height) if height <= width else (short * height // width, short)
    margins = (new[0] - size, new[1] - size)
    top, left = (round(margin / 2) if image else -(-margin // 2) for margin in margins)
    if crops != 3:
        return new, [(top, left)]
    if width >= height:
        return new, [(top, 0), (top, left), (top, margins[1])]
    return new, [(0, left), (top, left), (margins[0], left)]


class RandAugment(NamedTuple):
    """RandAugment with timm's fifteen increasing operations and its notation, "rand-m7-n4-mstd0.5-inc1"."""

    magnitude: float = 10.0  # m, from 0 to 10
    layers: int = 2  # n, operations per example
    deviation: float = 0.0  # mstd, standard deviation of the magnitude

    @classmethod
    def parse(cls, text: str) -> RandAugment | None:
        """Parse a policy in timm's notation; return None for an empty one.

        Raises:
          UserError: the policy is invalid, or lacks "inc1", which is required: only increasing operations are
            implemented.
        """
        if not text:
            return None
        number = r"\d{1,3}(?:\.\d+)?"
        if re.fullmatch(rf"rand(?:-m{number}|-n\d{{1,3}}|-mstd{number}|-inc1)*", text):
            values = dict(re.findall(rf"-(mstd|m|n|inc)({number})", text))
            policy = cls(float(values.get("m", 10)), int(values.get("n", 2)), float(values.get("mstd", 0)))
            if "inc" in values and policy.magnitude <= 10:
                return policy
        raise UserError(
            f"config.augment.randaugment is {text!r}; write it as 'rand-m7-n4-mstd0.5-inc1', with m up to 10"
        )

    def draw(
        self, size: tuple[int, int], fill: Fill, rng: np.random.Generator
    ) -> tuple[list[Operation], CropAffine]:
        """Draw `layers` operations with replacement and keep each with probability one half.

        Args:
          size: height and width of the frames.
          fill: RGB colour of pixels that come from outside the frame.
          rng: random generator.

        Returns:
          The operations, and the affine map from the augmented frame to the original one.
        """
        height, width = size
        drawn: list[Operation] = []
        affine = np.eye(3)
        for number in rng.choice(len(_OPERATIONS), self.layers):
            if rng.random() < 0.5:
                level = min(max(rng.normal(self.magnitude, self.deviation), 0.0), 10.0) / 10
                sign = 1 if rng.random() < 0.5 else -1
                make = _OPERATIONS[number]
                drawn.append(make(level, sign, size, fill))
                if make in _AFFINES:
                    affine = affine @ _AFFINES[make](sign * level, width / height)
        return drawn, affine


def draw_color_jitter(strength: float, rng: np.random.Generator) -> list[Operation]:
    """Draw operations that scale brightness, contrast and saturation, in random order.

    The factors are from 1 - strength to 1 + strength. This is torchvision's ColorJitter without hue.
    """
    makers = [operations.brighten, operations.contrast, operations.Saturate]
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, len(makers))
    return [makers[which](factors[which]) for which in rng.permutation(len(makers))]


# (level from 0 to 1, sign, (height, width), fill) -> operation.
_Maker = Callable[[float, int, tuple[int, int], Fill], Operation]


def _factor(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * level)


def _rotate(level: float, sign: int, size: tuple[int, int], fill: Fill) -> Operation:
    return operations.rotate(sign * 30 * level, size, fill)


def _shear_x(level: float, sign: int, size: tuple[int, int], fill: Fill) -> Operation:
    return operations.shear(sign * 0.3 * level, 0, fill)


def _shear_y(level: float, sign: int, size: tuple[int, int], fill: Fill) -> Operation:
    return operations.shear(0, sign * 0.3 * level, fill)


def _translate_x(level: float, sign: int, size: tuple[int, int], fill: Fill) -> Operation:
    return operations.shift(sign * 0.45 * level * size[1], 0, fill)


def _translate_y(level: float, sign: int, size: tuple[int, int], fill: Fill) -> Operation:
    return operations.shift(0, sign * 0.45 * level * size[0], fill)


# timm's increasing operations, in its order.
_OPERATIONS: tuple[_Maker, ...] = (
    lambda level, sign, size, fill: operations.autocontrast(),
    lambda level, sign, size, fill: operations.equalize(),
    lambda level, sign, size, fill: operations.invert(),
    _rotate,
    lambda level, sign, size, fill: operations.posterize(4 - int(4 * level)),
    lambda level, sign, size, fill: operations.solarize(256 - int(256 * level)),
    lambda level, sign, size, fill: operations.solarize_add(int(110 * level)),
    lambda level, sign, size, fill: operations.Saturate(_factor(level, sign)),
    lambda level, sign, size, fill: operations.contrast(_factor(level, sign)),
    lambda level, sign, size, fill: operations.brighten(_factor(level, sign)),
    lambda level, sign, size, fill: operations.Sharpen(_factor(level, sign)),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)


def _rotation(strength: float, aspect: float) -> CropAffine:
    angle = math.radians(-30 * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    # Converts fractions of the sides to units of the height, and moves the origin to the centre.
    to_centre = np.array([[aspect, 0, -aspect / 2], [0, 1, -0.5], [0, 0, 1]])
    return np.linalg.inv(to_centre) @ turn @ to_centre


# Affine maps of the operations that move pixels: (sign * level, width / height) -> map.
_AFFINES: dict[_Maker, Callable[[float, float], CropAffine]] = {
    _rotate: _rotation,
    _shear_x: lambda strength, aspect: np.array([[1, 0.3 * strength / aspect, 0], [0, 1, 0], [0, 0, 1]]),
    _shear_y: lambda strength, aspect: np.array([[1, 0, 0], [0.3 * strength * aspect, 1, 0], [0, 0, 1]]),
    _translate_x: lambda strength, aspect: np.array([[1, 0, 0.45 * strength], [0, 1, 0], [0, 0, 1]]),
    _translate_y: lambda strength, aspect: np.array([[1, 0, 0], [0, 1, 0.45 * strength], [0, 0, 1]]),
}
