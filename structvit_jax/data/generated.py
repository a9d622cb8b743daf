"""Examples that are generated on the fly: the base class, and random noise."""

from __future__ import annotations

import re

import numpy as np

from structvit_jax.data.media import InMemoryFrames
from structvit_jax.data.types import DataOptions
from structvit_jax.utils.errors import UserError

# Random stream of each split.
_STREAMS = {"train": 0, "test": 1, "tune": 2}


class Generated:
    """Examples that are generated on the fly. Example i is drawn from default_rng((*self._entropy, i)).

    Training examples depend on the seed; test examples are the same for every seed.

    Args:
      split: "train", "test", or "tune" for validation examples made of training data.
      examples: their number.
      seed: seed of training examples.

    Raises:
      UserError: `examples` is 0.
    """

    name: str

    def __init__(self, split: str, examples: int, seed: int):
        if examples < 1:
            key = f"config.data.{'train' if split == 'train' else 'test'}_examples"
            raise UserError(f"{self.name} is generated on the fly; set {key} to the number of examples")
        self._split, self._examples = split, examples
        self._entropy = (seed if split == "train" else 0, _STREAMS[split])

    def __len__(self) -> int:
        return self._examples

    @property
    def made_from(self) -> str:
        """Identify the examples in a fingerprint."""
        return f"{self.name}, numbers {self._entropy}"

    def id(self, index: int) -> str:
        return f"{self.name}/{self._split}/{index}"


class Noise(Generated):
    """Clips or images of random pixels with cyclic labels, to plan runs and to time steps without files.

    config.data.name is "noise:CLASSES". The frames of an example are as many and as large as the
    configuration needs; if the size is not set, they have 64 x 64 pixels.
    """

    name = "noise"

    def __init__(self, data: DataOptions, split: str, seed: int):
        classes = data.name.removeprefix("noise:")
        if not re.fullmatch("[1-9][0-9]{0,5}", classes):
            raise UserError(f"config.data.name is {data.name!r}; write noise:CLASSES, such as noise:400")
        super().__init__(split, data.test_examples if split == "test" else data.train_examples, seed)
        self.class_names = tuple(f"class {number}" for number in range(int(classes)))
        side = max(data.size or 64, data.short_side or 0)
        self._shape = (max(data.frames, 1) * data.stride, side, side, 3)

    @property
    def made_from(self) -> str:
        return f"noise of {len(self.class_names)} classes, numbers {self._entropy}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        pixels = np.random.default_rng((*self._entropy, index)).integers(0, 256, self._shape, np.uint8)
        return InMemoryFrames(pixels), index % len(self.class_names)
