"""Data sets. Nothing in this package imports jax, so reading never opens an accelerator."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from structvit_jax.data import folder
from structvit_jax.data.digits import DigitMotions, Digits, MovingDigits
from structvit_jax.data.fingerprint import Changes, Fingerprint, compare, fingerprint_of
from structvit_jax.data.label_maps import LabelMaps
from structvit_jax.data.limits import Limits
from structvit_jax.data.measure import typical
from structvit_jax.data.noise import Noise
from structvit_jax.data.pipeline import (
    WHOLE,
    Batch,
    Problem,
    Shard,
    test_batches,
    train_batches,
    uncropped_batches,
)
from structvit_jax.data.reader import Arrays, Reader, Source
from structvit_jax.data.survey import Survey, look_at
from structvit_jax.utils import class_names
from structvit_jax.utils.errors import UserError, unknown_choice

BUILT_IN: dict[str, Callable[[str, int, int], Source]] = {
    "moving_digits": MovingDigits,
    "digit_motions": DigitMotions,
    "digits": Digits,
}
SOURCES = (*BUILT_IN, "folder", "tfds:NAME", "noise:CLASSES")


class Dataset:
    """Two splits and the streams of batches over them."""

    def __init__(self, train: Source, test: Source, data: Any, augment: Any, seed: int):
        maps = _label_maps(train, data)
        self.train = Reader(train, data, augment, seed, maps)
        self.test = Reader(test, data, augment, seed)
        self._repeats, self._workers = augment.repeated_augmentation, data.workers
        self._names = data.train_split, data.test_split
        self.in_files = data.name == "folder"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one view of an example."""
        return self.train.shape

    @property
    def arrays(self) -> Arrays:
        """Shapes and types of what a training example has."""
        return self.train.arrays

    @property
    def unit(self) -> str:
        return "images" if self.train.is_image else "clips"

    @property
    def train_examples(self) -> int:
        return len(self.train.source)

    @property
    def rows_per_epoch(self) -> int:
        """An epoch has every example, in all its copies."""
        return self.train_examples * self._repeats

    @property
    def test_examples(self) -> int:
        return len(self.test.source)

    @property
    def test_ids(self) -> tuple[str, ...]:
        """What the test examples are called, in their order."""
        return tuple(map(self.test.source.id, range(self.test_examples)))

    def train_id(self, index: int) -> str:
        """What a training example is called."""
        return self.train.source.id(index)

    @property
    def views(self) -> int:
        """Of a test example."""
        return self.test.views

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies the data of both splits, see `structvit_jax.data.fingerprint`."""
        return {"train": fingerprint_of(self.train.source), "test": fingerprint_of(self.test.source)}

    def changes_since(self, old: Mapping[str, Fingerprint], *, test_only: bool = False) -> Changes:
        """Compare the data with the fingerprint of a run's, both splits or the test split alone."""
        if test_only:
            return compare(old, {"test": fingerprint_of(self.test.source)})
        return compare(old, self.fingerprint)

    def survey(self) -> Survey:
        """Look at both splits for a few seconds, see `structvit_jax.data.survey`."""
        train, test = self._names
        splits = {train: self.train.source, (test if test != train else f"{test} (again)"): self.test.source}
        return look_at(splits, video=not self.train.is_image, frames=self.train.data.frames)

    def adopt_classes(self, names: Sequence[str]) -> bool:
        """Number the labels as a trained model does; return whether that is another order than the data's.

        Names are matched as by `structvit_jax.utils.class_names.match`.

        Raises:
          UserError: the data have other classes.
        """
        own = self.train.source.class_names
        order = class_names.match(own, names)
        if order is None:
            lacking, new = class_names.difference(own, names)
            raise UserError(
                f"the data's {len(own)} classes are not the {len(names)} of the checkpoint: the data lack"
                f" {lacking} and add {new}; point config.data at the data of the run, or choose another"
                " --workdir for these"
            )
        for reader in (self.train, self.test):
            reader.adopt_classes(names, order)
        return order != list(range(len(order)))

    def train_batches(
        self, batch_size: int, *, start_step: int, share: tuple[int, int] = WHOLE
    ) -> Iterator[Batch]:
        """Endless; `share` is (host, hosts), the part of each batch that this process reads."""
        return train_batches(
            self.train,
            batch_size,
            repeats=self._repeats,
            start_step=start_step,
            share=Shard(*share),
            workers=self._workers,
        )

    def test_batches(self, batch_size: int, *, share: tuple[int, int] = WHOLE) -> Iterator[Batch]:
        """Every example once, with all its views."""
        return test_batches(self.test, batch_size, share=Shard(*share), workers=self._workers)

    def whole_batches(self, batch_size: int, *, start: int) -> Iterator[Batch]:
        """Every training image once, as a whole, from batch `start` on."""
        return uncropped_batches(self.train, batch_size, start=start, workers=self._workers)


def _label_maps(train: Source, data: Any) -> LabelMaps | None:
    """The label maps of the training split, where they are configured."""
    if not data.label_maps:
        return None
    if data.frames:
        raise UserError("config.data.label_maps are for images; config.data.frames asks for clips")
    return LabelMaps(data.label_maps, [train.id(i) for i in range(len(train))], train.class_names)


def is_video(section: Any) -> bool:
    """Return whether the data of a configuration's section `data` are videos, by looking at most of them.

    Raises:
      UserError: data that are missing, empty or not understood.
    """
    if section.name != "folder":
        return section.name in ("moving_digits", "digit_motions")
    layout = _layout(section)
    if shards := _find_shards(layout.root):
        from structvit_jax.data import records  # imported here: TFDS takes seconds

        train = records.open_shards(shards, layout.train, layout.test, layout.limits)[0]
        return train.is_video
    return folder.is_video(layout)


def _layout(section: Any) -> folder.Layout:
    root = os.path.expanduser(section.root)
    limits = Limits.of(section)
    return folder.Layout(root, section.train_split, section.test_split, section.val_fraction, limits)


def _find_shards(root: str) -> str | None:
    """Return the folder of shards that a root is or has, if there is one."""
    if os.path.isfile(os.path.join(root, "features.json")) or os.path.isdir(os.path.join(root, "clips")):
        from structvit_jax.data import records  # imported here: TFDS takes seconds

        return records.find_shards(root)
    return None


def _open_folder(section: Any) -> tuple[Source, Source]:
    """Open shards, if that is what the folder holds, or else its files."""
    layout = _layout(section)
    if shards := _find_shards(layout.root):
        from structvit_jax.data import records  # imported here: TFDS takes seconds

        return records.open_shards(shards, layout.train, layout.test, layout.limits)
    return folder.read_splits(layout, video=section.frames > 0)


def sources(section: Any, seed: int = 0) -> tuple[Source, Source]:
    """Return the training and the test split that a configuration's section `data` describes.

    Raises:
      UserError: an unknown name, or data that are missing, empty or not understood.
    """
    if section.frames is None:
        raise UserError("config.data.frames is not set; structvit_jax.main alone chooses it by the data")
    name, root = section.name, os.path.expanduser(section.root)
    if name in BUILT_IN:
        make = BUILT_IN[name]
        tested = "tune" if section.test_split == "tune" else "test"
        return make("train", section.train_examples, seed), make(tested, section.test_examples, seed)
    if name == "folder":
        return _open_folder(section)
    if name.startswith("noise:"):
        return Noise(name, "train", section, seed), Noise(name, "test", section, seed)
    if name.startswith("tfds:"):
        from structvit_jax.data import records  # imported here: TFDS takes seconds

        splits = section.train_split, section.test_split
        return records.open_images(name.removeprefix("tfds:"), root, *splits, Limits.of(section))
    raise unknown_choice("data set", name, SOURCES)


def load(
    data: Mapping[str, Any],
    augment: Mapping[str, Any],
    seed: int = 0,
    splits: tuple[Source, Source] | None = None,
) -> Dataset:
    """Return the data set that a configuration describes.

    Args:
      data, augment: these sections of it.
      seed: of the order, the augmentation, and training data made on the fly; test data are the
        same for every seed.
      splits: what `sources` returned for the section, if it was called before.

    Raises:
      UserError: an unknown name, or data that are missing, empty or not understood.
    """
    options, policy = (types.SimpleNamespace(**dict(section.items())) for section in (data, augment))
    return Dataset(*(splits or sources(options, seed)), options, policy, seed)


__all__ = [
    "SOURCES",
    "Batch",
    "Dataset",
    "Problem",
    "Shard",
    "Source",
    "is_video",
    "load",
    "sources",
    "typical",
]
