"""Batches as a pure function of (seed, step): NumPy and grain, never an accelerator.

A batch is a dict of arrays over its examples:

    inputs  uint8 [batch, [time,] height, width, 3]
    labels  int32 [batch]
    mask    bool  [batch], False for padding, which counts nowhere
    index   int32 [batch], the example's place in its source
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to one split: example i is {"inputs": uint8 array, "label": int}."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one example's inputs
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


def train_batches(source: Source, *, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
    """Endless shuffled batches from step `start_step` on.

    Every epoch has an order and augmentation draws of its own. Slicing at the step makes resuming
    exact without saved state.
    """
    augment: Callable | None = getattr(source, "augment", None)
    data = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None).map(_Read(source))
    if augment is not None:
        data = data.random_map(augment)
    data = data.batch(batch_size, batch_fn=_stack)
    yield from _prefetched(data[start_step:])


def test_batches(source: Source, *, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch is padded with masked repetitions."""
    padded = -(-len(source) // batch_size) * batch_size
    data = grain.MapDataset.range(padded).map(_Read(source))
    data = data.batch(batch_size, batch_fn=_stack)
    yield from _prefetched(data)


class _Read:
    """Index -> example; indices past the end are padding."""

    def __init__(self, source: Source):
        self._source = source

    def __call__(self, index: int) -> dict[str, Any]:
        real = index < len(self._source)
        return self._source[index if real else 0] | {"mask": real, "index": index if real else -1}


def _stack(examples: list[dict[str, Any]]) -> Batch:
    return {
        "inputs": np.stack([example["inputs"] for example in examples]),
        "labels": np.array([example["label"] for example in examples], np.int32),
        "mask": np.array([example["mask"] for example in examples], bool),
        "index": np.array([example["index"] for example in examples], np.int32),
    }


def _prefetched(data: grain.MapDataset) -> Iterator[Batch]:
    """Reads ahead in two threads; closing the generator stops them."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(data.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
