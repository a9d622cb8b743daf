"""Types of the data that training and evaluation read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Arrays = dict[str, tuple[tuple[int, ...], type]]  # shape and dtype of one row, by key of a batch
# The rows of a batch that this process reads, as NumPy arrays: inputs, labels, mask, index; and `problems`.
Batch = Mapping[str, Any]


class Problem(Protocol):
    """An example that cannot be read, or a note on one that can."""

    @property
    def id(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def kind(self) -> str:
        """Return "unreadable", "repaired" (frames were replaced) or "short" (frames are repeated)."""
        ...

    @property
    def left_out(self) -> bool: ...


class Changes(Protocol):
    """Differences between the data of a run and those of its checkpoint."""

    @property
    def described(self) -> str:
        """Return one line; "" if there are none."""
        ...

    @property
    def alike(self) -> int:
        """Return how many of the sampled examples are the same."""
        ...

    @property
    def sampled(self) -> int: ...


class Dataset(Protocol):
    """A training and a test split, and the batches over them."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one view of an example: [frames,] size, size, 3."""
        ...

    @property
    def arrays(self) -> Arrays:
        """Return shapes and dtypes of one row of a training batch, without `mask` and `index`."""
        ...

    @property
    def unit(self) -> str:
        """Return "images" or "clips"."""
        ...

    @property
    def train_examples(self) -> int: ...
    @property
    def rows_per_epoch(self) -> int: ...
    @property
    def test_examples(self) -> int: ...
    @property
    def test_ids(self) -> tuple[str, ...]: ...
    @property
    def views(self) -> int:
        """Return the number of views of a test example."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]: ...
    def train_id(self, index: int) -> str: ...
    def changes_since(self, old: Mapping[str, Any], *, test_only: bool = False) -> Changes: ...
    def adopt_classes(self, names: Sequence[str]) -> bool: ...
    def train_batches(self, batch_size: int, *, start_step: int, share: tuple[int, int] = ...) -> Any: ...
    def test_batches(self, batch_size: int, *, share: tuple[int, int] = ...) -> Any: ...
