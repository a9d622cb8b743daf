"""Augmentation: crops, flips and RandAugment on the host; erasing, mixup and cutmix on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import load
from PIL import Image, ImageEnhance, ImageOps

from structvit_jax.data import augment
from structvit_jax.data.augment import RandAugment
from structvit_jax.training import mixing
from structvit_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
PICTURE = np.uint8(np.cumsum(np.cumsum(RNG.normal(0, 1, (40, 60, 3)), 0), 1) * 8 % 256)
FILL = (128, 128, 128)


def affine(image, matrix):
    how = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **how)


def solarize_add(image, add):
    pixels = np.asarray(image).astype(int)
    return Image.fromarray(np.uint8(np.where(pixels < 128, np.minimum(pixels + add, 255), pixels)))


# timm's "increasing" operations at magnitude 7, the sign positive, with numbers computed by hand.
GOLDEN = [
    ImageOps.autocontrast,
    ImageOps.equalize,
    ImageOps.invert,
    lambda i: i.rotate(21, resample=Image.Resampling.BICUBIC, fillcolor=FILL),  # 30 x 0.7 degrees
    lambda i: ImageOps.posterize(i, 2),  # 4 - int(4 x 0.7) bits
    lambda i: ImageOps.solarize(i, 77),  # 256 - int(256 x 0.7)
    lambda i: solarize_add(i, 77),  # int(110 x 0.7)
    lambda i: ImageEnhance.Color(i).enhance(1.63),  # 1 + 0.9 x 0.7
    lambda i: ImageEnhance.Contrast(i).enhance(1.63),
    lambda i: ImageEnhance.Brightness(i).enhance(1.63),
    lambda i: ImageEnhance.Sharpness(i).enhance(1.63),
    lambda i: affine(i, (1, 0.21, 0, 0, 1, 0)),
    lambda i: affine(i, (1, 0, 0, 0.21, 1, 0)),
    lambda i: affine(i, (1, 0, 0.315 * 60, 0, 1, 0)),  # 0.45 x 0.7 of the width
    lambda i: affine(i, (1, 0, 0, 0, 1, 0.315 * 40)),
]


@pytest.mark.parametrize("number", range(15))
def test_operations(number):
    image = Image.fromarray(PICTURE)
    ours = np.asarray(augment._OPERATIONS[number](image, 0.7, 1, FILL)).astype(int)
    assert np.abs(ours - np.asarray(GOLDEN[number](image))).max() <= 1
    assert len(augment._OPERATIONS) == 15
    if number >= 3:
        other = np.asarray(augment._OPERATIONS[number](image, 0.7, -1, FILL))
        signed = number not in (4, 5, 6)
        assert (other != ours).any() == signed


def test_the_policy():
    assert RandAugment.parse("rand-m7-n4-mstd0.5-inc1") == RandAugment(7.0, 4, 0.5)
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 2, 0.5)
    assert RandAugment.parse("") is None
    for text in ("rand-m7-n4", "m7-inc1", "rand-m11-inc1", "rand-n1.5-inc1", "rand-m7-inc1-p3", "augmix"):
        with pytest.raises(UserError, match="write it as"):
            RandAugment.parse(text)
    clip = np.stack([PICTURE] * 3)
    policy, unchanged = RandAugment(9.0, 1, 0.5), 0
    for seed in range(400):
        out, _ = policy(clip, FILL, np.random.default_rng(seed))
        assert (out[0] == out[1]).all() and (out[0] == out[2]).all()  # all frames alike
        unchanged += bool((out == clip).all())
    assert 160 < unchanged < 260  # one operation, applied half of the time; some change nothing


def test_random_boxes():
    """Uniform areas, log-uniform aspects, inside the frame; after ten misses the largest centred box."""
    rng = np.random.default_rng(0)
    boxes = np.array([augment.random_box(256, 340, (0.08, 0.5), (0.75, 4 / 3), rng) for _ in range(5000)])
    top, left, height, width = boxes.T
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= 256 and (left + width).max() <= 340
    areas, aspects = height * width / (256 * 340), width / height
    assert areas.min() > 0.075 and areas.max() < 0.505
    assert np.abs(np.quantile(areas, [0.25, 0.5, 0.75]) - [0.185, 0.29, 0.395]).max() < 0.02
    assert abs(np.log(aspects).mean()) < 0.02
    assert abs(np.mean(top / (256 - height + 1e-9)) - 0.5) < 0.03
    assert augment.random_box(10, 100, (1.0, 1.0), (0.75, 4 / 3), rng) == (0, 43, 10, 13)
    assert augment.random_box(100, 10, (1.0, 1.0), (0.75, 4 / 3), rng) == (43, 0, 13, 10)
    assert augment.random_box(24, 24, (1.0, 1.0), (1.0, 1.0), rng) == (0, 0, 24, 24)


def bilinear(frame, size):
    """Transcribe torch's interpolate: bilinear, align_corners=False, without antialiasing."""
    for axis, new in enumerate(size):
        old = frame.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape(-1, *[1] * (frame.ndim - axis - 1))
        high = np.minimum(low + 1, old - 1)
        frame = np.take(frame, low, axis) * (1 - weight) + np.take(frame, high, axis) * weight
    return frame


@pytest.mark.parametrize("size", [(24, 24), (17, 31), (64, 90)])
def test_resizing(size):
    clip = np.stack([PICTURE, PICTURE[::-1]])
    box = (3, 5, 33, 47)
    ours = augment.resize(clip, box, size, image=False)
    for frame, out in zip(clip, ours, strict=True):
        assert np.abs(bilinear(frame[3:36, 5:52].astype(float), size) - out).max() <= 1
    image = Image.fromarray(PICTURE).crop((5, 3, 52, 36)).resize(size[::-1], Image.Resampling.BICUBIC)
    assert (augment.resize(clip[:1], box, size, image=True)[0] == np.asarray(image)).all()


@pytest.mark.parametrize("turned", [False, True])
def test_three_crops(turned):
    """Short side to 24 (of 40, so 60 becomes 36): crops at 0, 6 and 12 of the long side."""
    clip = PICTURE[None] if not turned else np.rot90(PICTURE)[None]
    scaled = augment.resize(clip, (0, 0, *clip.shape[1:3]), (36, 24) if turned else (24, 36), image=False)
    crops = augment.test_crops(clip, 24, 1.0, 3, image=False)
    for crop, at in zip(crops, (0, 6, 12), strict=True):
        expected = scaled[:, at : at + 24] if turned else scaled[:, :, at : at + 24]
        assert (crop == expected).all()
    (middle,) = augment.test_crops(clip, 24, 1.0, 1, image=False)
    assert (middle == crops[1]).all()


def test_the_middle_crop_rounds_as_the_references_do():
    clip = np.arange(24 * 31, dtype=np.uint16).astype(np.uint8).reshape(1, 24, 31, 1).repeat(3, -1)
    assert (augment.test_crops(clip, 24, 1.0, 1, image=False)[0] == clip[:, :, 4:28]).all()  # ceil(3.5)
    assert (augment.test_crops(clip, 24, 1.0, 1, image=True)[0] == clip[:, :, 4:28]).all()  # round(3.5) = 4
    clip = clip[:, :, :29]
    assert (augment.test_crops(clip, 24, 1.0, 1, image=False)[0] == clip[:, :, 3:27]).all()  # ceil(2.5)
    assert (augment.test_crops(clip, 24, 1.0, 1, image=True)[0] == clip[:, :, 2:26]).all()  # round(2.5) = 2
    image = np.zeros((1, 300, 500, 3), np.uint8)
    assert augment.test_crops(image, 224, 224 / 256, 1, image=True).shape == (1, 1, 224, 224, 3)


def test_flips():
    clip = PICTURE[None]
    whole = ((1.0, 1.0), (1.5, 1.5))
    crops = (np.random.default_rng(seed) for seed in range(400))
    outs = [augment.random_crop(clip, 24, *whole, 0.25, rng, image=False)[0] for rng in crops]
    plain, _ = augment.random_crop(clip, 24, *whole, 0.0, np.random.default_rng(0), image=False)
    flipped = sum((out == plain[:, :, ::-1]).all() for out in outs)
    assert sum((out == plain).all() for out in outs) == 400 - flipped and 70 < flipped < 130


def test_erasing():
    """One box for all frames, fresh noise in each; a quarter of the rows, 2 % to 33 % of the picture."""
    inputs = jnp.full((400, 3, 48, 64, 3), 9.0)
    out = np.asarray(mixing.erase(jax.random.key(0), inputs, 0.25))
    erased = (out != 9.0).all(-1)
    assert (erased == erased[:, :1]).all()
    rows = erased[:, 0].any((1, 2))
    assert 70 < rows.sum() < 130
    areas, aspects = [], []
    for mask in erased[rows, 0]:
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].all() and mask.sum() == len(ys) * len(xs)
        areas.append(mask.mean())
        aspects.append(len(ys) / len(xs))
    assert min(areas) > 0.015 and max(areas) < 0.345 and 0.13 < np.mean(areas) < 0.22
    assert min(aspects) > 0.25 and max(aspects) < 3.7 and abs(np.log(aspects).mean()) < 0.25
    noise = out[rows][erased[rows]]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert (out[rows][:, 0] != out[rows][:, 1]).any()
    assert (mixing.erase(jax.random.key(0), inputs, 0.0) == 9.0).all()


def mixed(seed, mixup, cutmix, shape=(6, 2, 20, 30, 3)):
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=shape).astype(np.float32), np.eye(6, dtype=np.float32)[: shape[0]]
    out = mixing.mix(jax.random.key(seed), jnp.array(inputs), jnp.array(targets), mixup, cutmix)
    return inputs, targets, *map(np.asarray, out)


def test_mixup():
    shares = []
    for seed in range(60):
        inputs, targets, out, mixed_targets = mixed(seed, 0.8, 0.0)
        share = mixed_targets[0, 0]
        np.testing.assert_allclose(out, share * inputs + (1 - share) * inputs[::-1], atol=1e-5)
        np.testing.assert_allclose(mixed_targets, share * targets + (1 - share) * targets[::-1], atol=1e-6)
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 0.12 and 0.28 < np.std(shares) < 0.40  # Beta(.8, .8): 0.31


def test_cutmix():
    """A box from the partner, the same in all frames; targets follow its actual area."""
    for seed in range(60):
        inputs, targets, out, mixed_targets = mixed(seed, 0.0, 1.0)
        own, other = (out == inputs).all(-1), (out == inputs[::-1]).all(-1)
        assert (own ^ other).all()
        assert (other == other[0, 0]).all()
        kept = own[0, 0].mean()
        np.testing.assert_allclose(mixed_targets, kept * targets + (1 - kept) * targets[::-1], atol=1e-6)
        if other.any():
            ys, xs = np.flatnonzero(other[0, 0].any(1)), np.flatnonzero(other[0, 0].any(0))
            assert other[0, 0].sum() == (ys[-1] - ys[0] + 1) * (xs[-1] - xs[0] + 1)


def test_mixup_and_cutmix_alternate_at_random():
    boxes = sum((out == inputs).any() for inputs, _, out, _ in (mixed(seed, 0.8, 1.0) for seed in range(100)))
    assert 30 < boxes < 70


def test_images_are_mixed_like_clips():
    inputs, _, out, targets = mixed(3, 0.8, 1.0, (4, 20, 30, 3))
    assert out.shape == inputs.shape
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "operation", [None, *augment._GEOMETRIC], ids=lambda o: o.__name__.strip("_") if o else "crop"
)
def test_poses_say_where_pixels_come_from(operation):
    """The input encodes its coordinates as colours, so that output pixels show where they come from."""
    height, width = 96, 128
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    clip = np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8)[None]
    if operation is None:
        rng = np.random.default_rng(3)
        out, pose = augment.random_crop(clip, 64, (0.2, 0.5), (0.75, 4 / 3), 1.0, rng, image=False)
    else:
        out = np.asarray(operation(Image.fromarray(clip[0]), 0.6, -1, (255, 255, 255)))[None]
        pose = augment._GEOMETRIC[operation](-0.6, width / height)
    sides = out.shape[1:3]
    v, u = np.meshgrid(*((np.arange(n) + 0.5) / n for n in sides), indexing="ij")
    places = np.stack([u, v, np.ones_like(u)], axis=-1) @ pose.T
    inside = ((places[..., :2] > 0.03) & (places[..., :2] < 0.97)).all(-1)
    assert inside.mean() > 0.4
    assert np.abs(out[0, ..., :2] / 255 - places[..., :2])[inside].max() < 0.02


def test_poses_of_a_policy_compose():
    """Crop, mirror and two geometric operations in sequence, of images and clips."""
    height, width = 90, 120
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    clip = np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8)[None]
    crops = {"augment__crop_area": (0.5, 0.9), "augment__crop_aspect": (0.75, 1.33), "augment__flip": 0.5}
    for frames in (0, 1):
        reader = load(name="digits", frames=frames, size=64, **crops).train
        for seed in range(12):
            reader._policy = _Moves()
            out, pose = reader.transform(clip, np.random.default_rng(seed))
            v, u = np.meshgrid(*((np.arange(64) + 0.5) / 64,) * 2, indexing="ij")
            places = np.stack([u, v, np.ones_like(u)], axis=-1) @ pose.T
            known = out.reshape(64, 64, 3)[..., 2] == 0  # not filled
            inside = known & ((places[..., :2] > 0.05) & (places[..., :2] < 0.95)).all(-1)
            error = np.abs(out.reshape(64, 64, 3)[..., :2] / 255 - places[..., :2])[inside]
            assert inside.mean() > 0.2 and np.quantile(error, 0.95) < 0.03


class _Moves(RandAugment):
    """Always applies two geometric operations."""

    def __call__(self, clip, fill, rng):
        pose = np.eye(3)
        for number in rng.choice(len(augment._GEOMETRIC), 2):
            operation = list(augment._GEOMETRIC)[number]
            level = rng.uniform(0.1, 0.6)
            clip = np.stack([np.asarray(operation(Image.fromarray(f), level, 1, (0, 0, 255))) for f in clip])
            pose = pose @ augment._GEOMETRIC[operation](level, clip.shape[2] / clip.shape[1])
        return clip, pose


def test_colour_jitter():
    clip = np.stack([PICTURE] * 2)
    seen = [augment.color_jitter(clip, 0.4, np.random.default_rng(seed)) for seed in range(20)]
    assert all((out[0] == out[1]).all() for out in seen)
    brightness = [float(out.mean() / PICTURE.mean()) for out in seen]
    assert min(brightness) < 0.8 < 1.15 < max(brightness)
    assert (augment.color_jitter(clip, 0.0, np.random.default_rng(0)) == clip).all()
