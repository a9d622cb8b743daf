"""Open the data set that a configuration describes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from structvit_jax.data import folder, idx_files, pipeline
from structvit_jax.data.cached_source import open_cache
from structvit_jax.data.digits import DigitMotions, Digits, MovingDigits
from structvit_jax.data.fingerprint import Changes, Fingerprint, compare, fingerprint_of
from structvit_jax.data.garments import GarmentMotions, MovingGarments
from structvit_jax.data.generated import Noise
from structvit_jax.data.label_maps import LabelMaps
from structvit_jax.data.limits import Limits
from structvit_jax.data.reader import Reader
from structvit_jax.data.survey import Survey, survey
from structvit_jax.data.types import WHOLE, AugmentOptions, Batch, DataOptions, Dataset, Shard, Source
from structvit_jax.utils import class_names
from structvit_jax.utils.errors import UserError, unknown_choice

if TYPE_CHECKING:
    from structvit_jax.data.tfds_reader import Shards

BUILT_IN: dict[str, Callable[[str, int, int], Source]] = {
    "moving_digits": MovingDigits,
    "digit_motions": DigitMotions,
    "digits": Digits,
}
# Clips generated from the images in config.data.root.
MOVING_IMAGES: dict[str, Callable[[str, str, int, int], Source]] = {
    "moving_garments": MovingGarments,
    "garment_motions": GarmentMotions,
}
SOURCES = (*BUILT_IN, *MOVING_IMAGES, "folder", "tfds:NAME", "noise:CLASSES")


class ConfiguredDataset(Dataset):
    """The data set of a configuration: a training and a test split, each with a reader."""

    def __init__(self, train: Source, test: Source, data: DataOptions, augment: AugmentOptions, seed: int):
        self.train = Reader(train, data, augment, seed, _label_maps(train, data))
        self.test = Reader(test, data, augment, seed)
        self.class_names = train.class_names
        self.shape, self.arrays, self.views = self.train.shape, self.train.arrays, self.test.views
        self.unit = "images" if self.train.is_image else "clips"
        self.in_files = data.name == "folder"
        self.train_examples, self.test_examples = len(train), len(test)
        self._cache_line: str | None = None
        self.rows_per_epoch = len(train) * augment.repeated_augmentation

    @property
    def test_ids(self) -> tuple[str, ...]:
        return tuple(map(self.test.source.id, range(self.test_examples)))

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        return {"train": fingerprint_of(self.train.source), "test": fingerprint_of(self.test.source)}

    def train_id(self, index: int) -> str:
        return self.train.source.id(index)

    def changes_since(self, old: Mapping[str, Fingerprint], *, test_only: bool = False) -> Changes:
        if test_only:
            return compare(old, {"test": fingerprint_of(self.test.source)})
        return compare(old, self.fingerprint)

    def survey(self) -> Survey:
        options = self.train.data
        train, test = options.train_split, options.test_split
        splits = {train: self.train.source, (test if test != train else f"{test} (again)"): self.test.source}
        return survey(splits, video=not self.train.is_image, frames=options.frames)

    def adopt_classes(self, names: Sequence[str]) -> bool:
        own = self.train.source.class_names
        order = class_names.match(own, names)
        if order is None:
            missing, added = class_names.difference(own, names)
            raise UserError(
                f"the data have {len(own)} classes, which differ from the {len(names)} classes of the"
                f" checkpoint: the data lack {missing} and add {added}; set config.data to the data of the"
                " run, or choose another --workdir for these data"
            )
        for reader in (self.train, self.test):
            reader.adopt_classes(names, order)
        self.class_names = tuple(names)
        return order != list(range(len(order)))

    def start_cache(self) -> str:
        if self._cache_line is None:
            readers = (self.train, self.test)
            cached, self._cache_line = open_cache([reader.source for reader in readers], self.train.data)
            for reader, source in zip(readers, cached, strict=False):  # there are none without a cache
                reader.cached = source
        return self._cache_line

    def train_batches(self, batch_size: int, *, start_step: int, shard: Shard = WHOLE) -> Generator[Batch]:
        return pipeline.train_batches(self.train, batch_size, start_step=start_step, shard=shard)

    def test_batches(self, batch_size: int, *, shard: Shard = WHOLE) -> Generator[Batch]:
        return pipeline.test_batches(self.test, batch_size, shard=shard)

    def uncropped_batches(self, batch_size: int, *, start: int) -> Generator[Batch]:
        return pipeline.uncropped_batches(self.train, batch_size, start=start)


def _label_maps(train: Source, data: DataOptions) -> LabelMaps | None:
    if not data.label_maps:
        return None
    if data.frames:
        raise UserError(
            f"config.data.label_maps are for images, but config.data.frames={data.frames} makes clips"
        )
    return LabelMaps(data.label_maps, [train.id(i) for i in range(len(train))], train.class_names)


def is_video(section: Any) -> bool:
    """Return whether most examples of a data set are videos.

    Args:
      section: section `data` of a configuration, which describes the data set.

    Raises:
      UserError: the data are missing, empty or in an unknown layout.
    """
    options = DataOptions.from_config(section)
    if options.name != "folder":
        return options.name in ("moving_digits", "digit_motions", *MOVING_IMAGES)
    layout = _layout(options)
    if shards := find_shards(layout.root):
        return _open_shards(shards, layout)[0].is_video
    if idx_files.is_idx(layout.root):
        return False
    return folder.is_video(layout)


def _layout(options: DataOptions) -> folder.Layout:
    root = os.path.expanduser(options.root)
    limits = Limits.of(options)
    return folder.Layout(root, options.train_split, options.test_split, options.val_fraction, limits)


def find_shards(root: str) -> str | None:
    """Return the folder of ArrayRecord shards in a data root, or None if it has none."""
    candidates = (os.path.join(root, "clips", "1.0.0"), root)
    return next((f for f in candidates if os.path.isfile(os.path.join(f, "features.json"))), None)


def _open_shards(root: str, layout: folder.Layout) -> tuple[Shards, Shards]:
    from structvit_jax.data import tfds_reader  # imported here: importing TFDS takes seconds

    return tfds_reader.open_shards(root, layout.train, layout.test, layout.limits)


def sources(section: Any, seed: int = 0) -> tuple[Source, Source]:
    """Open the training and the test split of a data set.

    Args:
      section: section `data` of a configuration, which describes the data set.
      seed: seed of generated training data; generated test data are the same for every seed.

    Raises:
      UserError: the name is unknown, or the data are missing, empty or in an unknown layout.
    """
    options = DataOptions.from_config(section)
    if options.frames is None:
        raise UserError("config.data.frames is not set; set it to the frames of a clip, or to 0 for images")
    name = options.name
    if make := _generator(options):
        test = "tune" if options.test_split == "tune" else "test"
        return make("train", options.train_examples, seed), make(test, options.test_examples, seed)
    if name.startswith("noise:"):
        return Noise(options, "train", seed), Noise(options, "test", seed)
    layout = _layout(options)
    if name == "folder":
        if shards := find_shards(layout.root):
            return _open_shards(shards, layout)
        if idx_files.is_idx(layout.root):
            return idx_files.read_splits(layout)
        return folder.read_splits(layout, video=options.frames > 0)
    if name.startswith("tfds:"):
        from structvit_jax.data import tfds_reader  # imported here: importing TFDS takes seconds

        name = name.removeprefix("tfds:")
        return tfds_reader.open_images(name, layout.root, layout.train, layout.test, layout.limits)
    raise unknown_choice("data set", name, SOURCES)


def _generator(options: DataOptions) -> Callable[[str, int, int], Source] | None:
    """Return the function that makes a split from its name, its number of examples and a seed."""
    if make := MOVING_IMAGES.get(options.name):
        return functools.partial(make, os.path.expanduser(options.root))
    return BUILT_IN.get(options.name)


def load(
    data: Any, augment: Any, seed: int = 0, splits: tuple[Source, Source] | None = None
) -> ConfiguredDataset:
    """Return the data set that a configuration describes.

    Args:
      data, augment: the sections of these names of a configuration.
      seed: seed of the order, the augmentation, and generated training data; generated test data are the same
        for every seed.
      splits: the result of `sources`, if you have called it already.

    Raises:
      UserError: the name is unknown, or the data are missing, empty or in an unknown layout.
    """
    options, policy = DataOptions.from_config(data), AugmentOptions.from_config(augment)
    return ConfiguredDataset(*(splits or sources(data, seed)), options, policy, seed)
