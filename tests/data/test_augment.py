"""Augmentation: crops, flips and RandAugment on the host; erasing, mixup and cutmix on the device."""

import itertools

import augment_definition as definition
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import load
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from structvit_jax.data import augment, frame_operations, pixels
from structvit_jax.data.augment import RandAugment
from structvit_jax.data.reader import Augmentation
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


PHOTOS = load_sample_images().images


def photo(rng, height, width):
    """Return a random part of a photograph."""
    picture = PHOTOS[rng.integers(len(PHOTOS))]
    top, left = rng.integers(picture.shape[0] - height + 1), rng.integers(picture.shape[1] - width + 1)
    return picture[top : top + height, left : left + width]


@pytest.fixture(params=["C++", "Pillow"])
def implementation(request, monkeypatch):
    """Run a test with the compiled library, and without it."""
    if request.param == "Pillow":
        monkeypatch.setattr(pixels, "_library", lambda: None)
    elif not pixels._library():
        pytest.skip("needs a C++ compiler")


def make(number, level, sign, size):
    return augment._OPERATIONS[number](level, sign, size, FILL)


def apply(number, level, sign, frame):
    operation = make(number, level, sign, frame.shape[:2])
    return frame_operations.apply([operation], frame[None], (0, 0, *frame.shape[:2]))[0]


@pytest.mark.parametrize("number", range(15))
def test_operations(number):
    ours = apply(number, 0.7, 1, PICTURE).astype(int)
    assert np.abs(ours - np.asarray(GOLDEN[number](Image.fromarray(PICTURE)))).max() <= 1
    assert len(augment._OPERATIONS) == 15
    if number >= 3:
        signed = number not in (4, 5, 6)
        assert (apply(number, 0.7, -1, PICTURE) != ours).any() == signed


@pytest.mark.parametrize("number", range(15))
def test_an_operation_equals_its_definition(number, implementation):
    """Bit for bit, on photographs of odd sizes and on boxes of the result."""
    rng = np.random.default_rng(number)
    sizes = [(1, 1), (1, 9), (7, 2), (3, 3), (224, 224), *rng.integers(4, 200, (5, 2)).tolist()]
    for (height, width), level, sign in itertools.product(sizes, (0.0, 0.31, 1.0), (1, -1)):
        frame = photo(rng, height, width)
        expected = definition.OPERATIONS[number](Image.fromarray(frame), level, sign, FILL)
        operation = make(number, level, sign, (height, width))
        top, left = int(rng.integers(height)), int(rng.integers(width))
        h, w = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
        for y, x, rows, columns in ((0, 0, height, width), (top, left, h, w)):
            (ours,) = frame_operations.apply([operation], frame[None], (y, x, rows, columns))
            assert (ours == np.asarray(expected)[y : y + rows, x : x + columns]).all()


@pytest.mark.parametrize("frames", [0, 3])
def test_a_composed_policy_equals_its_definition(frames, implementation):
    """Bit for bit: RandAugment, colour jitter, crop and flip of images and clips of odd sizes."""
    crop = {"crop_area": (0.08, 1.0), "crop_aspect": (0.75, 1.33), "flip": 0.5, "color_jitter": 0.4}
    changes = {f"augment__{key}": value for key, value in crop.items()}
    policy = "rand-m9-n6-mstd3-inc1"
    reader = load(name="digits", frames=frames, size=57, augment__randaugment=policy, **changes).train
    rng = np.random.default_rng(0)
    for seed in range(40):
        height, width = rng.integers(8, 250, 2)
        clip = np.stack([photo(rng, height, width) for _ in range(max(frames, 1))])
        expected, affine = definition.transform(reader, clip, np.random.default_rng(seed))
        drawn = reader.draw(clip.shape[1:3], np.random.default_rng(seed))
        out = np.empty(reader.shape, np.uint8)
        reader.transform(clip, drawn, out)
        assert (out == expected).all()
        np.testing.assert_allclose(reader.affine(drawn), affine, atol=1e-12)


def test_resampling_equals_pillow(implementation):
    rng = np.random.default_rng(0)
    for number in range(60):
        (height, width), (rows, columns) = rng.integers(1, 200, (2, 2)).tolist()
        rows, columns = rows if number % 5 else height, columns if number % 7 else width
        frame = (
            photo(rng, height, width) if number % 2 else rng.integers(0, 256, (height, width, 3), np.uint8)
        )
        expected = Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC)
        assert (pixels.resample(frame, (rows, columns)) == np.asarray(expected)).all()


def test_the_policy():
    assert RandAugment.parse("rand-m7-n4-mstd0.5-inc1") == RandAugment(7.0, 4, 0.5)
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 2, 0.5)
    assert RandAugment.parse("") is None
    for text in ("rand-m7-n4", "m7-inc1", "rand-m11-inc1", "rand-n1.5-inc1", "rand-m7-inc1-p3", "augmix"):
        with pytest.raises(UserError, match="write it as"):
            RandAugment.parse(text)
    policy = RandAugment(9.0, 1, 0.5)
    drawn = [policy.draw((40, 60), FILL, np.random.default_rng(seed)) for seed in range(400)]
    assert {len(one) for one in drawn} == {0, 1} and 160 < sum(map(len, drawn)) < 240  # half of the time


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
    frame = PICTURE[3:36, 5:52]
    ours = augment.resize(frame, size, image=False)
    assert np.abs(bilinear(frame.astype(float), size) - ours).max() <= 1
    assert (augment.resize(frame, size, image=False, mirrored=True) == ours[:, ::-1]).all()


@pytest.mark.parametrize("turned", [False, True])
def test_three_crops(turned):
    """Short side to 24 (of 40, so 60 becomes 36): crops at 0, 6 and 12 of the long side."""
    frame = np.rot90(PICTURE) if turned else PICTURE
    scaled = augment.resize(frame, (36, 24) if turned else (24, 36), image=False)
    crops = augment.test_crops(frame[None], 24, 1.0, 3, image=False)
    for crop, at in zip(crops, (0, 6, 12), strict=True):
        assert (crop[0] == (scaled[at : at + 24] if turned else scaled[:, at : at + 24])).all()
    (middle,) = augment.test_crops(frame[None], 24, 1.0, 1, image=False)
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
    draws = [
        augment.draw_crop((40, 60), (1, 1), (1.5, 1.5), 0.25, np.random.default_rng(s)) for s in range(400)
    ]
    assert {crop.box for crop in draws} == {(0, 0, 40, 60)}
    assert 70 < sum(crop.mirrored for crop in draws) < 130


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


MOVING = {"rotate": 3, "shear_x": 11, "shear_y": 12, "translate_x": 13, "translate_y": 14}
BLUE = (0, 0, 255)


def coordinates(height, width):
    """Return a picture whose red and green are its coordinates."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8)


def places(height, width, affine):
    """Return where the pixels of a picture come from: x and y, in fractions."""
    v, u = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return (np.stack([u, v, np.ones_like(u)], axis=-1) @ affine.T)[..., :2]


@pytest.mark.parametrize("name", ["crop", *MOVING])
def test_poses_say_where_pixels_come_from(name):
    """The input encodes its coordinates as colours, so that output pixels show where they come from."""
    picture, size = coordinates(96, 128), (96, 128)
    if name == "crop":
        crop = augment.draw_crop(size, (0.2, 0.5), (0.75, 4 / 3), 1.0, np.random.default_rng(3))
        top, left, height, width = crop.box
        out = augment.resize(
            picture[top : top + height, left : left + width], (64, 64), image=False, mirrored=crop.mirrored
        )
        affine = crop.affine()
    else:
        operation = augment._OPERATIONS[MOVING[name]](0.6, -1, size, (255, 255, 255))
        (out,) = frame_operations.apply([operation], picture[None], (0, 0, *size))
        affine = frame_operations.affine([operation], size)
    found = places(*out.shape[:2], affine)
    inside = ((found > 0.03) & (found < 0.97)).all(-1)
    assert inside.mean() > 0.4
    assert np.abs(out[..., :2] / 255 - found)[inside].max() < 0.02


@pytest.mark.parametrize("frames", [0, 1])
def test_poses_of_a_policy_compose(frames):
    """Crop, mirror and two moving operations in sequence, of images and clips."""
    crops = {"augment__crop_area": (0.5, 0.9), "augment__crop_aspect": (0.75, 1.33), "augment__flip": 0.5}
    reader = load(name="digits", frames=frames, size=64, **crops).train
    picture = coordinates(90, 120)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        drawn = reader.draw((90, 120), rng)
        size = (90, 120) if frames else (64, 64)
        chosen = rng.choice(list(MOVING.values()), 2)
        moves = [augment._OPERATIONS[number](rng.uniform(0.1, 0.6), 1, size, BLUE) for number in chosen]
        drawn = Augmentation(moves, drawn.crop)
        out = np.empty(reader.shape, np.uint8)
        reader.transform(picture[None], drawn, out)
        out = out.reshape(64, 64, 3)
        found = places(64, 64, reader.affine(drawn))
        inside = (out[..., 2] == 0) & ((found > 0.05) & (found < 0.95)).all(-1)  # not filled
        error = np.abs(out[..., :2] / 255 - found)[inside]
        assert inside.mean() > 0.2 and np.quantile(error, 0.95) < 0.03


def test_colour_jitter():
    def jitter(strength, seed):
        drawn = augment.draw_color_jitter(strength, np.random.default_rng(seed))
        return frame_operations.apply(drawn, PICTURE[None], (0, 0, 40, 60))[0]

    brightness = [float(jitter(0.4, seed).mean() / PICTURE.mean()) for seed in range(20)]
    assert min(brightness) < 0.8 < 1.15 < max(brightness)
    assert (jitter(0.0, 0) == PICTURE).all()
