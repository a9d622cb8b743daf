"""Data sets. Nothing in this room imports jax, so reading never opens an accelerator."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from structvit_jax import class_names
from structvit_jax.data.digits import DigitMotions, Digits, MovingDigits
from structvit_jax.data.index import read_splits
from structvit_jax.data.label_maps import LabelMaps
from structvit_jax.data.limits import Limits
from structvit_jax.data.noise import Noise
from structvit_jax.data.pipeline import (
    WHOLE,
    Batch,
    Problem,
    Share,
    test_batches,
    train_batches,
    whole_batches,
)
from structvit_jax.data.reader import Arrays, Reader, Source
from structvit_jax.errors import UserError, unknown

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
        self._repeats, self._workers = augment.repeats, data.workers

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

    def adopt_classes(self, names: Sequence[str]) -> bool:
        """Number the labels as a trained model does; return whether that is another order than the data's.

        Names are matched as by `structvit_jax.class_names.match`.

        Raises:
          UserError: the data have other classes.
        """
        own = self.train.source.class_names
        order = class_names.match(own, names)
        if order is None:
            lacking, new = class_names.difference(own, names)
            raise UserError(
                f"the data's {len(own)} classes are not the {len(names)} of the checkpoint: the data lack"
                f" {lacking} and add {new}; point config.data at the data of the run"
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
            share=Share(*share),
            workers=self._workers,
        )

    def test_batches(self, batch_size: int, *, share: tuple[int, int] = WHOLE) -> Iterator[Batch]:
        """Every example once, with all its views."""
        return test_batches(self.test, batch_size, share=Share(*share), workers=self._workers)

    def whole_batches(self, batch_size: int, *, start: int) -> Iterator[Batch]:
        """Every training image once, as a whole, from batch `start` on."""
        return whole_batches(self.train, batch_size, start=start, workers=self._workers)


def _label_maps(train: Source, data: Any) -> LabelMaps | None:
    """The label maps of the training split, where they are configured."""
    if not data.label_maps:
        return None
    if data.frames:
        raise UserError("config.data.label_maps are for images; config.data.frames asks for clips")
    return LabelMaps(data.label_maps, [train.id(i) for i in range(len(train))], train.class_names)


def _open_folder(root: str, train: str, test: str, *, video: bool, limits: Limits) -> tuple[Source, Source]:
    """Open shards, if that is what the folder holds, or else its files."""
    if os.path.isfile(os.path.join(root, "features.json")) or os.path.isdir(os.path.join(root, "clips")):
        from structvit_jax.data import records  # imported here: TFDS takes seconds

        if folder := records.find_shards(root):
            return records.open_shards(folder, train, test, limits)
    return read_splits(root, train, test, video=video, limits=limits)


def load(data: Mapping[str, Any], augment: Mapping[str, Any], seed: int = 0) -> Dataset:
    """The data set that a configuration describes.

    Args:
      data, augment: these sections of it.
      seed: of the order, the augmentation, and training data made on the fly; test data are the
        same for every seed.

    Raises:
      UserError: an unknown name, or data that are missing, empty or not understood.
    """
    options, policy = (types.SimpleNamespace(**dict(section.items())) for section in (data, augment))
    options.root = os.path.expanduser(options.root)
    name, splits = options.name, (options.train_split, options.test_split)
    limits = Limits.of(options)
    train: Source
    test: Source
    if name in BUILT_IN:
        make = BUILT_IN[name]
        tested = "tune" if options.test_split == "tune" else "test"
        train, test = make("train", options.train_examples, seed), make(tested, options.test_examples, seed)
    elif name == "folder":
        train, test = _open_folder(options.root, *splits, video=options.frames > 0, limits=limits)
    elif name.startswith("noise:"):
        train, test = (Noise(name, split, options, seed) for split in ("train", "test"))
    elif name.startswith("tfds:"):
        from structvit_jax.data import records  # imported here: TFDS takes seconds

        train, test = records.open_images(name.removeprefix("tfds:"), options.root, *splits, limits)
    else:
        raise unknown("data set", name, SOURCES)
    return Dataset(train, test, options, policy, seed)


__all__ = ["SOURCES", "Batch", "Dataset", "Problem", "Share", "Source", "load"]
