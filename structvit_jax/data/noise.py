"""Noise in the shape of a data set that is not available: to plan runs, and to time steps without reading."""

from __future__ import annotations

import re

import numpy as np

from structvit_jax.data.media import InMemoryFrames
from structvit_jax.data.types import DataOptions
from structvit_jax.utils.errors import UserError


class Noise:
    """Clips or images of random pixels with cyclic labels; nothing can be learned from them.

    The name is "noise:CLASSES"; every example has exactly the frames and pixels that the configuration takes,
    or 64 pixels a side if the size is not set.
    """

    def __init__(self, data: DataOptions, split: str, seed: int):
        name = data.name
        classes = name.removeprefix("noise:")
        examples = data.test_examples if split == "test" else data.train_examples
        if not re.fullmatch("[1-9][0-9]{0,5}", classes):
            raise UserError(f"config.data.name is {name!r}; write noise:CLASSES, as noise:400")
        if examples < 1:
            raise UserError(
                f"noise is made on the fly; set config.data.{split}_examples to the number of examples"
            )
        self.class_names = tuple(f"class {number}" for number in range(int(classes)))
        side = max(data.size or 64, data.short_side or 0)
        self._shape = (max(data.frames, 1) * data.stride, side, side, 3)
        self._split, self._examples = split, examples
        self._entropy = (0, 1) if split == "test" else (seed, 0)  # test data are the same for every seed

    def __len__(self) -> int:
        return self._examples

    @property
    def made_from(self) -> str:
        """Identifies the examples in a fingerprint."""
        return f"noise of {len(self.class_names)} classes, numbers {self._entropy}"

    def id(self, index: int) -> str:
        return f"noise/{self._split}/{index}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        pixels = np.random.default_rng((*self._entropy, index)).integers(0, 256, self._shape, np.uint8)
        return InMemoryFrames(pixels), index % len(self.class_names)
