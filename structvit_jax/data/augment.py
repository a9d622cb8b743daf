"""Crops, flips, RandAugment and colour jitter on the host, with Pillow and OpenCV.

A clip is uint8 [time, height, width, 3]; an image is a clip of one frame. All frames of a clip are
augmented in the same way. Erasing, mixup and cutmix run on the device, see `structvit_jax.training.mixing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from structvit_jax.utils.errors import UserError

Box = tuple[int, int, int, int]  # top, left, height, width
Fill = tuple[int, int, int]  # RGB
# float64 [3, 3]: maps a point (x, y, 1) of the output to the point of the input that is shown there. Both are
# in fractions of the width and height.
CropAffine = np.ndarray
_MIRRORED: CropAffine = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])


def resize(clip: np.ndarray, box: Box, size: tuple[int, int], *, image: bool) -> np.ndarray:
    """Crop a box out of every frame and resize it to `size` (height, width).

    Images are resized bicubically with antialiasing, as in timm with Pillow. Clips are resized bilinearly
    without antialiasing, as in UniFormer with torch's `interpolate`, and rounded to whole pixel values.
    """
    top, left, height, width = box
    clip = clip[:, top : top + height, left : left + width]
    if (height, width) == size:
        return np.ascontiguousarray(clip)
    width_height = size[::-1]
    if image:
        frames = [Image.fromarray(frame).resize(width_height, Image.Resampling.BICUBIC) for frame in clip]
        return np.stack([np.asarray(frame) for frame in frames])
    return np.stack([cv2.resize(frame, width_height, interpolation=cv2.INTER_LINEAR) for frame in clip])


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


def random_crop(
    clip: np.ndarray,
    size: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    rng: np.random.Generator,
    *,
    image: bool,
) -> tuple[np.ndarray, CropAffine]:
    """Crop one random box out of all frames, resize it to size x size, and mirror it with probability `flip`.

    Returns:
      The crop, uint8 [time, size, size, 3], and the affine map from it to the clip.
    """
    height, width = clip.shape[1:3]
    top, left, h, w = box = random_box(height, width, area, aspect, rng)
    clip = resize(clip, box, (size, size), image=image)
    affine = np.array([[w / width, 0, left / width], [0, h / height, top / height], [0, 0, 1]])
    if rng.random() < flip:
        return np.ascontiguousarray(clip[:, :, ::-1]), affine @ _MIRRORED
    return clip, affine


def test_crops(clip: np.ndarray, size: int, fraction: float, crops: int, *, image: bool) -> np.ndarray:
    """Return the test crops of a clip, see `test_boxes`: uint8 [crops, time, size, size, 3]."""
    height, width = clip.shape[1:3]
    new, corners = test_boxes(height, width, size, fraction, crops, image=image)
    clip = resize(clip, (0, 0, height, width), new, image=image)
    return np.stack([clip[:, top : top + size, left : left + size] for top, left in corners])


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

    def __call__(
        self, clip: np.ndarray, fill: Fill, rng: np.random.Generator
    ) -> tuple[np.ndarray, CropAffine]:
        """Draw `layers` operations with replacement and apply each with probability one half.

        Args:
          clip: uint8 [time, height, width, 3].
          fill: RGB colour of pixels that come from outside the frame.
          rng: random generator.

        Returns:
          The augmented clip, and the affine map from it to the original clip.
        """
        chosen, affine = [], np.eye(3)
        for operation in rng.choice(len(_OPERATIONS), self.layers):
            if rng.random() < 0.5:
                level = min(max(rng.normal(self.magnitude, self.deviation), 0.0), 10.0) / 10
                chosen.append((_OPERATIONS[operation], level, 1 if rng.random() < 0.5 else -1))
        if not chosen:
            return clip, affine
        frames = [Image.fromarray(frame) for frame in clip]
        for operation, level, sign in chosen:
            frames = [operation(frame, level, sign, fill) for frame in frames]
            if operation in _GEOMETRIC:
                affine = affine @ _GEOMETRIC[operation](sign * level, clip.shape[2] / clip.shape[1])
        return np.stack([np.asarray(frame) for frame in frames]), affine


def color_jitter(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scale brightness, contrast and saturation in random order by factors from 1 - strength to 1 + strength.

    This is torchvision's ColorJitter without hue.
    """
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, len(enhancers))
    frames = [Image.fromarray(frame) for frame in clip]
    for which in rng.permutation(len(enhancers)):
        frames = [enhancers[which](frame).enhance(factors[which]) for frame in frames]
    return np.stack([np.asarray(frame) for frame in frames])


# (image, level from 0 to 1, sign, fill) -> image.
Operation = Callable[[Image.Image, float, int, Fill], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    bicubic = Image.Resampling.BICUBIC
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bicubic, fillcolor=fill)


def _rotate(image: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return image.rotate(sign * 30 * level, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    add = int(110 * level)
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign, fill: enhancer(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _shear_x(image: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), fill)


def _translate_x(image: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height), fill)


# timm's increasing operations, in its order.
_OPERATIONS: tuple[Operation, ...] = (
    lambda image, level, sign, fill: ImageOps.autocontrast(image),
    lambda image, level, sign, fill: ImageOps.equalize(image),
    lambda image, level, sign, fill: ImageOps.invert(image),
    _rotate,
    lambda image, level, sign, fill: ImageOps.posterize(image, 4 - int(4 * level)),
    lambda image, level, sign, fill: ImageOps.solarize(image, 256 - int(256 * level)),
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
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
_GEOMETRIC: dict[Operation, Callable[[float, float], CropAffine]] = {
    _rotate: _rotation,
    _shear_x: lambda strength, aspect: np.array([[1, 0.3 * strength / aspect, 0], [0, 1, 0], [0, 0, 1]]),
    _shear_y: lambda strength, aspect: np.array([[1, 0, 0], [0.3 * strength * aspect, 1, 0], [0, 0, 1]]),
    _translate_x: lambda strength, aspect: np.array([[1, 0, 0.45 * strength], [0, 1, 0], [0, 0, 1]]),
    _translate_y: lambda strength, aspect: np.array([[1, 0, 0], [0, 1, 0.45 * strength], [0, 0, 1]]),
}
