"""Crops, flips, RandAugment and colour jitter on the host.

A clip is uint8 [time, height, width, 3]; an image is a clip of one frame. All frames of a clip are
augmented in the same way. Everything random is drawn first, so that `structvit_jax.data.frame_operations`
computes only the pixels that the crop needs. Erasing, mixup and cutmix run on the device, see
`structvit_jax.training.mixing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from structvit_jax.data import frame_operations, pixels
from structvit_jax.data.frame_operations import CropAffine, Operation
from structvit_jax.data.pixels import Box, Fill
from structvit_jax.utils.errors import UserError


def resize(frame: np.ndarray, size: tuple[int, int], *, image: bool, mirrored: bool = False) -> np.ndarray:
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
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(*log_aspect))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
            return int(top), int(left), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


class RandomCrop(NamedTuple):
    """A random crop: a box of frames of size (height, width), which may be mirrored."""

    size: tuple[int, int]
    box: Box
    mirrored: bool

    def affine(self) -> CropAffine:
        """Return the affine map from the crop to the frame."""
        (height, width), (top, left, h, w) = self.size, self.box
        affine = np.array([[w / width, 0, left / width], [0, h / height, top / height], [0, 0, 1]])
        return affine @ np.array([[-1, 0, 1], [0, 1, 0], [0, 0, 1]]) if self.mirrored else affine


def draw_crop(
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    rng: np.random.Generator,
) -> RandomCrop:
    """Draw a random crop of frames of this size (height, width), mirrored with probability `flip`."""
    box = random_box(*size, area, aspect, rng)
    return RandomCrop(size, box, bool(rng.random() < flip))


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

    def draw(self, size: tuple[int, int], fill: Fill, rng: np.random.Generator) -> list[Operation]:
        """Draw `layers` operations with replacement, and return each with probability one half.

        Args:
          size: height and width of the frames.
          fill: RGB colour of pixels that come from outside the frame.
          rng: random generator.
        """
        drawn = []
        for number in rng.choice(len(_OPERATIONS), self.layers):
            if rng.random() < 0.5:
                level = min(max(rng.normal(self.magnitude, self.deviation), 0.0), 10.0) / 10
                sign = 1 if rng.random() < 0.5 else -1
                drawn.append(_OPERATIONS[number](level, sign, size, fill))
        return drawn


def draw_color_jitter(strength: float, rng: np.random.Generator) -> list[Operation]:
    """Draw operations that scale brightness, contrast and saturation, in random order.

    The factors are from 1 - strength to 1 + strength. This is torchvision's ColorJitter without hue.
    """
    makers = [frame_operations.brighten, frame_operations.contrast, frame_operations.Saturate]
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, len(makers))
    return [makers[which](factors[which]) for which in rng.permutation(len(makers))]


# (level from 0 to 1, sign, (height, width), fill) -> operation.
_Maker = Callable[[float, int, tuple[int, int], Fill], Operation]


def _factor(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * level)


# timm's increasing operations, in its order.
_OPERATIONS: tuple[_Maker, ...] = (
    lambda level, sign, size, fill: frame_operations.autocontrast(),
    lambda level, sign, size, fill: frame_operations.equalize(),
    lambda level, sign, size, fill: frame_operations.invert(),
    lambda level, sign, size, fill: frame_operations.rotate(sign * 30 * level, size, fill),
    lambda level, sign, size, fill: frame_operations.posterize(4 - int(4 * level)),
    lambda level, sign, size, fill: frame_operations.solarize(256 - int(256 * level)),
    lambda level, sign, size, fill: frame_operations.solarize_add(int(110 * level)),
    lambda level, sign, size, fill: frame_operations.Saturate(_factor(level, sign)),
    lambda level, sign, size, fill: frame_operations.contrast(_factor(level, sign)),
    lambda level, sign, size, fill: frame_operations.brighten(_factor(level, sign)),
    lambda level, sign, size, fill: frame_operations.Sharpen(_factor(level, sign)),
    lambda level, sign, size, fill: frame_operations.shear(sign * 0.3 * level, 0, fill),
    lambda level, sign, size, fill: frame_operations.shear(0, sign * 0.3 * level, fill),
    lambda level, sign, size, fill: frame_operations.shift(sign * 0.45 * level * size[1], 0, fill),
    lambda level, sign, size, fill: frame_operations.shift(0, sign * 0.45 * level * size[0], fill),
)
