"""Choose values that fit the data for keys that a configuration leaves open (None).

`configs/folder.py` leaves the model, the sizes, the durations, the learning rate and the crops open. Values
that the user sets are kept. A resumed run uses the values of its checkpoint (see
`structvit_jax.training.start.resolve_open_keys`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
from ml_collections import config_dict

from structvit_jax.config.keys import KEYS, check_config, get_value, model_arguments, set_value
from structvit_jax.config.values import steps_in
from structvit_jax.models.variants import get_variant

OPEN = (
    "model.name",
    "data.frames",
    "data.size",
    "data.short_side",
    "data.batch_size",
    "augment.crop_area",
    "train.duration",
    "optimizer.lr",
    "optimizer.warmup",
    "eval.every",
    "checkpoint.every",
)
_EPOCHS_FROM_SCRATCH, _EPOCHS_FROM_WEIGHTS = 30, 20
# Limits on the training examples of a run, counted with repetitions. On two CPU cores, a tiny model sees the
# smallest number in minutes and the largest in about an hour.
_EXAMPLES_VIDEOS, _EXAMPLES_IMAGES = (12_000, 160_000), (50_000, 2_000_000)
SHORT_SIDE_RATIO = 1.5  # of frames to a small input size; crops of half the area keep their detail
_SMALL, _SHORT_SIDE_VIDEOS = 64, 256  # pixels


class DataFacts(NamedTuple):
    """Sizes of a data set."""

    train_examples: int
    test_examples: int
    width: int  # median, pixels
    height: int
    frames: int  # median


def leave_open(config: ml_collections.ConfigDict, *keys: str) -> None:
    """Set keys of OPEN to None; their types remain fixed."""
    for key in keys:
        set_value(config, key, config_dict.placeholder(KEYS[key].type))


def missing(config: ml_collections.ConfigDict) -> list[str]:
    """Return the keys of OPEN that are open."""
    return [key for key in OPEN if get_value(config, key) is None]


def check_given(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first value outside its range, like `check_config`, but skip open keys."""
    closed = config.copy_and_resolve_references()
    for key in missing(closed):
        set_value(closed, key, 1 if key == "data.size" else KEYS[key].default)
    check_config(closed)


def fill_model(config: ml_collections.ConfigDict, is_video: Callable[[], bool]) -> None:
    """Set the model and the number of frames if they are open.

    If only one of them is open, it follows from the other. If both are, they follow from the data.

    Args:
      config: changed in place.
      is_video: returns whether the data are videos; only called if both keys are open.
    """
    name, frames = config.model.name, config.data.frames
    if frames is None and name is None:
        video = is_video()
    else:
        video = name.endswith("_video") if frames is None else frames > 0
    if name is None:
        config.model.name = "structvit_tiny_4_1_video" if video else "structvit_tiny_4_1"
    if frames is None:
        config.data.frames = (8 if _is_tiny(config) else 16) if video else 0


def fill(config: ml_collections.ConfigDict, facts: DataFacts) -> None:
    """Set all other open keys, in place.

    - input size: the short side of the data, rounded up to a multiple of the model's stride, at most 64 (tiny
      models) or 224; for DeiT, the size of its learned positions
    - batch: 16 clips; or 16 to 64 images (tiny models: to 128), chosen for 32 or more steps per epoch; never
      more than there are training examples, but at least 2
    - short side of frames: 1.5 times an input size of at most 64, so that they are cheap to convert and to
      cache; above that, 256 for videos, and 1.5 times the input size for images that have at least twice that
      (JPEG files are then decoded at a fraction of their size)
    - random crops: 0.5 to 1 of the area of clips, 0.7 to 1 of the area of images
    - duration: as many examples as 30 epochs (20 from trained weights), at least 12,000 and at most 160,000
      clips, or at least 50,000 and at most 2,000,000 images
    - learning rate: 3e-3 for tiny models, 1e-3 for others
    - warm-up: a twentieth of the run
    - evaluation: six times during the run, if it has at least 60 steps
    - checkpoints: one per epoch, limited to intervals of 50 to 500 steps
    """
    _fill(config, "data.size", _size(config, min(facts.width, facts.height)))
    _fill(config, "data.short_side", _short_side(config, facts))
    _fill(config, "data.batch_size", _batch(config, facts.train_examples))
    _fill(config, "augment.crop_area", (0.5, 1.0) if config.data.frames else (0.7, 1.0))
    rows = facts.train_examples * config.augment.repeated_augmentation
    epoch = rows / config.data.batch_size
    _fill(config, "train.duration", f"{_examples(config, rows)} examples")
    total = steps_in(config.train.duration, "config.train.duration", config.data.batch_size, rows)
    _fill(config, "optimizer.lr", 3e-3 if _is_tiny(config) else 1e-3)
    _fill(config, "optimizer.warmup", f"{total // 20} steps")
    _fill(config, "eval.every", f"{math.ceil(total / 6)} steps" if total >= 60 else "")
    _fill(config, "checkpoint.every", f"{round(min(max(epoch, 50), 500))} steps")


def describe(config: ml_collections.ConfigDict, facts: DataFacts) -> str:
    """Return one line with the sizes of the data and the chosen model, input size, batch and duration."""
    rows = facts.train_examples * config.augment.repeated_augmentation
    total = steps_in(config.train.duration, "config.train.duration", config.data.batch_size, rows)
    unit, data, inputs = "images", f"{facts.width}x{facts.height}", f"{config.data.size}"
    if config.data.frames:
        unit, data = "videos", f"{facts.frames} frames of {data}"
        inputs = f"{config.data.frames} frames of {config.data.size}"
    return (
        f"{unit}: {facts.train_examples:,} + {facts.test_examples:,} of {data}: {config.model.name} at"
        f" {inputs}, batch {config.data.batch_size}, {total:,} steps"
    )


def _size(config: ml_collections.ConfigDict, side: int) -> int:
    """Return the input size for data with this short side, both in pixels."""
    variant = get_variant(**model_arguments(config))
    if variant.network == "deit":
        return variant.image_size
    stride, largest = 8 * variant.patch, 64 if _is_tiny(config) else 224
    return min(math.ceil(side / stride) * stride, max(largest // stride, 1) * stride)


def _batch(config: ml_collections.ConfigDict, examples: int) -> int:
    """Return the batch size for this number of training examples."""
    wanted = 16
    if not config.data.frames:
        wanted = min(max(_power_of_two(examples / 32), 16), 128 if _is_tiny(config) else 64)
    return min(wanted, max(_power_of_two(examples), 2))


def _short_side(config: ml_collections.ConfigDict, facts: DataFacts) -> int:
    """Return the short side to which frames are shrunk, at least what test crops need."""
    smallest = math.ceil(config.data.size / config.data.crop_fraction)
    side = max(math.ceil(SHORT_SIDE_RATIO * config.data.size), smallest)
    if config.data.size <= _SMALL:
        return side
    if config.data.frames:
        return max(_SHORT_SIDE_VIDEOS, smallest)
    return side if min(facts.width, facts.height) >= 2 * side else 0


def _examples(config: ml_collections.ConfigDict, rows: int) -> int:
    """Return the number of examples to train on, for this number of rows in an epoch."""
    epochs = _EPOCHS_FROM_SCRATCH if config.init_from == "" else _EPOCHS_FROM_WEIGHTS
    least, most = _EXAMPLES_VIDEOS if config.data.frames else _EXAMPLES_IMAGES
    return min(max(epochs * rows, least), most)


def _power_of_two(number: float) -> int:
    """Return the largest power of two that is not above a number, but at least 1."""
    return 2 ** int(math.log2(number)) if number >= 1 else 1


def _is_tiny(config: ml_collections.ConfigDict) -> bool:
    return "tiny" in config.model.name


def _fill(config: ml_collections.ConfigDict, key: str, value: object) -> None:
    """Set a key if it is open."""
    if get_value(config, key) is None:
        set_value(config, key, value)
