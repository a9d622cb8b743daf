"""Data sets by name. Nothing in this room imports jax, so reading never opens an accelerator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from structvit_jax.data.digits import Digits, MovingDigits
from structvit_jax.data.pipeline import Batch, Source, test_batches, train_batches
from structvit_jax.errors import UserError, did_you_mean

SOURCES: dict[str, Callable[[str, int, int], Source]] = {"moving_digits": MovingDigits, "digits": Digits}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two splits and the streams of batches over them."""

    train: Source
    test: Source
    seed: int  # of the training order and augmentation

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def unit(self) -> str:
        return "clips" if len(self.train.shape) == 4 else "images"

    def train_batches(self, batch_size: int, *, start_step: int) -> Iterator[Batch]:
        return train_batches(self.train, batch_size=batch_size, seed=self.seed, start_step=start_step)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        return test_batches(self.test, batch_size=batch_size)


def load(name: str, *, train_examples: int = 0, test_examples: int = 0, seed: int = 0) -> Dataset:
    """A data set by name.

    Args:
      name: a key of `SOURCES`.
      train_examples, test_examples: sizes for data that are made on the fly; others have their own.
      seed: of the order, the augmentation, and training data made on the fly; test data are the
        same for every seed.

    Raises:
      UserError: an unknown name, or a size below one for data that are made on the fly.
    """
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}.{did_you_mean(name, SOURCES)}")
    make = SOURCES[name]
    return Dataset(make("train", train_examples, seed), make("test", test_examples, seed), seed)


__all__ = ["SOURCES", "Batch", "Dataset", "Source", "load"]
