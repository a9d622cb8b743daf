"""The definition of the augmentation: the same draws as `structvit_jax.data`, and Pillow frame by frame."""

import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from structvit_jax.data.augment import random_box

_MIRRORED = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])


def transform(reader, clip, rng):
    """Augment and crop a clip like `Reader.transform`; return the pixels and their affine map to the clip."""
    first, second = (_crop, _recolour) if reader.is_image else (_recolour, _crop)
    clip, affine = first(reader, clip, rng)
    clip, after = second(reader, clip, rng)
    return clip.reshape(reader.shape), affine @ after


def _recolour(reader, clip, rng):
    affine = np.eye(3)
    if policy := reader._policy:
        means = reader.data.mean if reader.is_image and reader.data.mean else (0.5, 0.5, 0.5)
        clip, affine = randaugment(policy, clip, tuple(round(255 * mean) for mean in means), rng)
    if reader.augment.color_jitter:
        clip = color_jitter(clip, reader.augment.color_jitter, rng)
    return clip, affine


def _crop(reader, clip, rng):
    options = reader.augment
    ranges = options.crop_area, options.crop_aspect, options.flip
    return random_crop(clip, reader.data.size, *ranges, rng, image=reader.is_image)


def resize(clip, box, size, *, image):
    top, left, height, width = box
    clip = clip[:, top : top + height, left : left + width]
    if (height, width) == size:
        return np.ascontiguousarray(clip)
    width_height = size[::-1]
    if image:
        frames = [Image.fromarray(frame).resize(width_height, Image.Resampling.BICUBIC) for frame in clip]
        return np.stack([np.asarray(frame) for frame in frames])
    return np.stack([cv2.resize(frame, width_height, interpolation=cv2.INTER_LINEAR) for frame in clip])


def random_crop(clip, size, area, aspect, flip, rng, *, image):
    height, width = clip.shape[1:3]
    top, left, h, w = box = random_box(height, width, area, aspect, rng)
    clip = resize(clip, box, (size, size), image=image)
    affine = np.array([[w / width, 0, left / width], [0, h / height, top / height], [0, 0, 1]])
    if rng.random() < flip:
        return np.ascontiguousarray(clip[:, :, ::-1]), affine @ _MIRRORED
    return clip, affine


def randaugment(policy, clip, fill, rng):
    """Draw the operations of a `RandAugment` and apply them."""
    chosen, affine = [], np.eye(3)
    for operation in rng.choice(len(OPERATIONS), policy.layers):
        if rng.random() < 0.5:
            level = min(max(rng.normal(policy.magnitude, policy.deviation), 0.0), 10.0) / 10
            chosen.append((OPERATIONS[operation], level, 1 if rng.random() < 0.5 else -1))
    if not chosen:
        return clip, affine
    frames = [Image.fromarray(frame) for frame in clip]
    for operation, level, sign in chosen:
        frames = [operation(frame, level, sign, fill) for frame in frames]
        if operation in _GEOMETRIC:
            affine = affine @ _GEOMETRIC[operation](sign * level, clip.shape[2] / clip.shape[1])
    return np.stack([np.asarray(frame) for frame in frames]), affine


def color_jitter(clip, strength, rng):
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, len(enhancers))
    frames = [Image.fromarray(frame) for frame in clip]
    for which in rng.permutation(len(enhancers)):
        frames = [enhancers[which](frame).enhance(factors[which]) for frame in frames]
    return np.stack([np.asarray(frame) for frame in frames])


def _affine(image, matrix, fill):
    bicubic = Image.Resampling.BICUBIC
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bicubic, fillcolor=fill)


def _rotate(image, level, sign, fill):
    return image.rotate(sign * 30 * level, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image, level, sign, fill):
    add = int(110 * level)
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _enhance(enhancer):
    return lambda image, level, sign, fill: enhancer(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _shear_x(image, level, sign, fill):
    return _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), fill)


def _shear_y(image, level, sign, fill):
    return _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), fill)


def _translate_x(image, level, sign, fill):
    return _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0), fill)


def _translate_y(image, level, sign, fill):
    return _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height), fill)


# timm's increasing operations, in its order.
OPERATIONS = (
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


def _rotation(strength, aspect):
    angle = math.radians(-30 * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    # Converts fractions of the sides to units of the height, and moves the origin to the centre.
    to_centre = np.array([[aspect, 0, -aspect / 2], [0, 1, -0.5], [0, 0, 1]])
    return np.linalg.inv(to_centre) @ turn @ to_centre


# Affine maps of the operations that move pixels: (sign * level, width / height) -> map.
_GEOMETRIC = {
    _rotate: _rotation,
    _shear_x: lambda strength, aspect: np.array([[1, 0.3 * strength / aspect, 0], [0, 1, 0], [0, 0, 1]]),
    _shear_y: lambda strength, aspect: np.array([[1, 0, 0], [0.3 * strength * aspect, 1, 0], [0, 0, 1]]),
    _translate_x: lambda strength, aspect: np.array([[1, 0, 0.45 * strength], [0, 1, 0], [0, 0, 1]]),
    _translate_y: lambda strength, aspect: np.array([[1, 0, 0], [0, 1, 0.45 * strength], [0, 0, 1]]),
}
