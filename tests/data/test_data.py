"""The built-in data and the pipeline as pure functions of (seed, step)."""

import os
import subprocess
import sys

import numpy as np
import pytest
from clips import load, same, take
from conftest import ROOT
from PIL import Image

from structvit_jax.data.augment import RandAugment
from structvit_jax.data.media import InMemoryFrames
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

DIGITS = {"name": "digits", "frames": 0, "size": 32}


def clip(reader, index=5):
    """Return all frames of an example."""
    return reader.source.open(index)[0].frames(range(8))


@pytest.fixture(scope="module")
def clips():
    return load(seed=3, train_examples=40, test_examples=21)


def test_batches_have_the_documented_keys_shapes_and_types(clips):
    (batch,) = take(clips.train_batches(6, start_step=0), 1)
    assert batch.pop("problems") == ()
    kinds = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert kinds == {
        "inputs": ((6, 8, 24, 24, 3), "uint8"),
        "labels": ((6,), "int32"),
        "mask": ((6,), "bool"),
        "index": ((6,), "int32"),
    }
    assert batch["mask"].all()
    assert (batch["labels"] == batch["index"] % 8).all()


@pytest.mark.parametrize("name", ["moving_digits", "digits"])
def test_starting_at_a_step_equals_reading_up_to_it(name):
    """Also across the end of an epoch inside a batch."""
    dataset = load(**DIGITS) if name == "digits" else load(train_examples=40, test_examples=8)
    size = 12 if name == "moving_digits" else 600
    through = take(dataset.train_batches(size, start_step=0), 6)
    for step in (1, 3, 5):
        (resumed,) = take(dataset.train_batches(size, start_step=step), 1)
        assert same(resumed, through[step])


def test_every_epoch_has_each_example_once_in_a_different_order(clips):
    batches = take(clips.train_batches(10, start_step=0), 8)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(2, 40)
    assert (np.sort(epochs) == np.arange(40)).all()
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] != np.arange(40)).any()


def test_augmentation_differs_between_epochs_and_is_off_in_testing():
    digits = load(**DIGITS, augment__crop_area=(0.3, 1.0))
    epochs = [take(digits.train_batches(1437, start_step=step), 1)[0] for step in (0, 1)]
    first, second = (batch["inputs"][np.argsort(batch["index"])] for batch in epochs)
    changed = (first != second).any(axis=(1, 2, 3)).mean()
    assert changed > 0.9
    (test,) = take(digits.test_batches(360), 1)
    assert (test["inputs"][7, 0] == digits.test.source.open(7)[0].frames([0])[0]).all()


def test_test_batches_hold_every_example_once(clips):
    batches = take(clips.test_batches(8), 99)
    assert len(batches) == 3
    seen = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    assert seen.tolist() == list(range(21))
    assert sum((~batch["mask"]).sum() for batch in batches) == 3


def test_clips_are_functions_of_seed_and_index(clips):
    again, other = (load(seed=seed, train_examples=40, test_examples=21) for seed in (3, 4))
    assert (clip(clips.train) == clip(again.train)).all()
    assert (clip(clips.train) != clip(other.train)).any()
    assert (clip(clips.train) != clip(clips.test)).any()
    assert (clip(clips.test) == clip(other.test)).all()  # all seeds are tested on the same clips


def test_the_digit_moves_in_the_direction_of_its_label():
    """The displacement between frames, measured by correlation, has the direction and speed of the class."""
    clips = load(train_examples=48, test_examples=1).train
    for index in range(48):
        spectrum = np.fft.fft2(clip(clips, index)[..., 0].astype(float))
        cross = (spectrum[3:] * np.conj(spectrum[:-3])).sum(axis=0)  # three frames apart: 2.25 to 5.25 px
        correlation = np.fft.ifft2(cross).real
        row, column = np.unravel_index(correlation.argmax(), correlation.shape)
        row, column = ((n + 12) % 24 - 12 for n in (row, column))
        angle = np.rad2deg(np.arctan2(-row, column))
        assert abs((angle - 45 * (index % 8) + 180) % 360 - 180) < 22.5
        assert 1.5 <= np.hypot(row, column) <= 6


def test_single_frames_have_the_same_mean_in_all_classes():
    """Means of one frame over many clips agree between classes within their noise."""
    clips = load(train_examples=1600, test_examples=1).train
    frames = np.stack([clip(clips, i)[4, ..., 0] for i in range(1600)]).astype(float)
    means = np.stack([frames[c::8].mean(axis=0) for c in range(8)])
    noise = frames.std(axis=0).mean() / np.sqrt(200)
    assert 0.8 < means.std(axis=0).mean() / noise < 1.2


def test_no_scan_is_in_both_splits():
    digits = load(**DIGITS)
    assert (digits.train_examples, digits.test_examples) == (1437, 360)
    from sklearn.datasets import load_digits

    assert [digits.test.source.open(i)[1] for i in range(360)] == load_digits().target[1437:].tolist()


def test_channel_order():
    colours = load(**DIGITS, channels="bgr", test_crops=3).test
    picture = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
    (clip,) = colours.decode(InMemoryFrames(picture), [np.array([0])])
    assert (clip == picture[..., ::-1]).all()
    assert colours.test(0)["inputs"].shape == (3, 32, 32, 3)


def test_too_elongated_images_are_rejected():
    """Scaled to the size of the model, an image of one pixel by millions would need all memory."""
    reader = load(**DIGITS, max_pixels=10_000).test
    (fitting,) = reader.decode(InMemoryFrames(np.zeros((1, 9, 1, 3), np.uint8)), [np.array([0])])
    assert fitting.shape == (1, 9, 1, 3)
    with pytest.raises(DecodeError, match="1 x 10 pixels: resized for the model's input of size 32"):
        reader.decode(InMemoryFrames(np.zeros((1, 10, 1, 3), np.uint8)), [np.array([0])])


def test_max_pixels_applies_to_files(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (20, 10)).save(tmp_path / split / label / "x.png")
    for pixels, readable in ((200, 4), (199, 0)):
        dataset = load(**DIGITS | {"name": "folder", "root": str(tmp_path), "size": 8, "max_pixels": pixels})
        (batch,) = take(dataset.train_batches(4, start_step=0), 1)
        assert batch["mask"].sum() == readable


def test_clips_with_few_frames_are_noted():
    (batch,) = take(load(train_examples=8, test_examples=8, frames=8).train_batches(4, start_step=0), 1)
    assert batch["problems"] == ()
    (batch,) = take(load(train_examples=8, test_examples=8, frames=9).train_batches(4, start_step=0), 1)
    assert {(p.kind, p.reason) for p in batch["problems"]} == {("short", "fewer than the 9 frames of a clip")}
    assert len(batch["problems"]) == 4 and batch["mask"].all()


def test_unknown_data_sets_are_rejected():
    with pytest.raises(UserError, match="'moving_digits'"):
        load(name="moving_digit")
    for name in ("noise:\u00b2", "noise:" + "9" * 5000, "noise:0"):
        with pytest.raises(UserError, match="write noise:CLASSES"):
            load(name=name)


@pytest.mark.parametrize("split", ["val", "tune"])
def test_generated_data_need_a_number_of_examples(split):
    with pytest.raises(UserError, match=r"moving_digits is generated .* set config\.data\.test_examples to"):
        load(test_split=split, train_examples=1, test_examples=0)
    with pytest.raises(UserError, match=r"noise is generated .* set config\.data\.train_examples to"):
        load(name="noise:3", train_examples=0)


def test_digits_have_no_validation_split():
    """Or an ablation would select learning rates on test scans."""
    with pytest.raises(UserError, match="digits has no validation split 'tune'"):
        load(name="digits", test_split="tune")


IMPORT_ALL = """
import importlib, sys
import structvit_jax.data.types
assert not {"cv2", "av", "PIL"} & sys.modules.keys()
import cv2
from PIL import Image
cv2.setNumThreads(3)
for name in sys.argv[1:]:
    importlib.import_module(f"structvit_jax.data.{name}")
assert cv2.getNumThreads() == 3 and Image.MAX_IMAGE_PIXELS
assert "jax" not in sys.modules
"""


def test_imports_change_no_setting_and_the_types_need_no_decoder():
    names = [path.stem for path in (ROOT / "structvit_jax/data").glob("*.py") if path.stem != "__init__"]
    assert subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT).returncode == 0


def test_reading_opens_no_device():
    """JAX_PLATFORMS names a platform that does not exist, so that opening a device fails."""
    code = "import clips; next(clips.load(train_examples=9, test_examples=9).train_batches(4, start_step=0))"
    environment = os.environ | {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT / "tests")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == 0


def test_images_are_cropped_before_randaugment_and_clips_after_it(monkeypatch):
    """As in timm for images and in UniFormer for clips."""
    for frames, expected in ((0, (24, 24)), (2, (40, 60))):
        reader = load(**{**DIGITS, "frames": frames, "size": 24}, augment__randaugment="rand-m9-inc1").train
        seen = []
        monkeypatch.setattr(RandAugment, "draw", lambda self, *args, seen=seen: seen.append(args[:2]) or [])
        drawn = reader.draw((40, 60), np.random.default_rng(0))
        out = np.empty(reader.shape, np.uint8)
        reader.transform(np.zeros((max(frames, 1), 40, 60, 3), np.uint8), drawn, out)
        assert seen == [(expected, (128, 128, 128))]  # for images the mean, 0.5


@pytest.mark.parametrize("rule", ["dense", "strided", "segment"])
def test_images_need_no_random_frames(rule, monkeypatch):
    """One generator per copy of an image; a video of one frame repeats it under every sampling rule."""
    reader, calls = load(**DIGITS, sampling=rule).train, []
    monkeypatch.setattr(reader, "generator", lambda *path: calls.append(path) or np.random.default_rng(path))
    reader.train(0, 5, range(2))
    assert calls == [(2, 0, 5, 0), (2, 0, 5, 1)]
    video = load(**{**DIGITS, "frames": 4}, sampling=rule).train
    assert video.frames(1, np.random.default_rng(0)).tolist() == [0] * 4
    (clip,) = video.train(0, 5, range(1))["inputs"]
    assert clip.shape == (4, 32, 32, 3) and (clip == clip[0]).all()


def test_every_test_example_is_on_one_host(clips):
    for hosts in (2, 4):
        shards = [take(clips.test_batches(8, shard=(host, hosts)), 99) for host in range(hosts)]
        index = np.concatenate([batch["index"] for batches in shards for batch in batches])
        assert sorted(index[index >= 0]) == list(range(21))
        assert {len(batches) for batches in shards} == {3}
    with pytest.raises(UserError, match="a batch of 8 is not divisible by 3 processes"):
        take(clips.test_batches(8, shard=(0, 3)), 1)
