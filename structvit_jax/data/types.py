"""Types of the data package that other packages are written against. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, Protocol, Self, TypedDict

import numpy as np
from numpy.typing import DTypeLike

if TYPE_CHECKING:
    from structvit_jax.data.fingerprint import Changes, Fingerprint
    from structvit_jax.data.survey import Survey

Arrays = dict[str, tuple[tuple[int, ...], DTypeLike]]  # shape and dtype of one row, by key of a batch


class Problem(NamedTuple):
    """An example that cannot be read, or a note on one that can."""

    id: str
    reason: str
    # "repaired": some frames were replaced by their neighbours; "short": fewer frames than a clip has.
    kind: Literal["unreadable", "repaired", "short"] = "unreadable"

    @property
    def left_out(self) -> bool:
        return self.kind == "unreadable"


class Batch(TypedDict):
    """The rows of one batch that this process reads, as NumPy arrays."""

    inputs: np.ndarray  # uint8 [rows, [time,] height, width, 3] in training, [rows, views, ...] in testing
    labels: np.ndarray  # int32 [rows]
    mask: np.ndarray  # bool [rows]; False for padding and unreadable examples, which count nowhere
    index: np.ndarray  # int32 [rows]; position of the example in its split, -1 for padding
    problems: tuple[Problem, ...]  # unreadable examples, and notes on readable ones
    # In training with label maps:
    map_classes: NotRequired[np.ndarray]  # uint16 [rows, map height, map width, k], of the whole image
    map_scores: NotRequired[np.ndarray]  # float16, probabilities of these classes
    pose: NotRequired[np.ndarray]  # float32 [rows, 2, 3]; takes a point of the crop to one of the image


# The part of every batch that a process reads, (host, hosts): the host-th of `hosts` equal runs of rows.
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)


class Media(Protocol):
    """Frames 0 to count - 1 in display order, of which the last `missing` are lost.

    `repaired` counts the frames of the last `frames` call that were replaced by their neighbours.
    """

    count: int
    missing: int

    @property
    def repaired(self) -> int: ...

    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        """Return frames by number.

        Args:
          wanted: frame numbers below `count`, in any order, with or without repetitions.
          short_side: scale frames down whose short side is longer than this; 0 never scales.

        Returns:
          uint8 [len(wanted), height, width, 3], RGB.

        Raises:
          DecodeError: a frame cannot be read.
        """
        ...

    def close(self) -> None:
        """Release files and decoders."""
        ...


class Source(Protocol):
    """Random access to the examples of one split, in a fixed order."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """Return the name of an example in reports and predictions."""
        ...

    def open(self, index: int) -> tuple[Media, int]:
        """Return the frames and the label of an example.

        Raises:
          DecodeError: it cannot be read.
        """
        ...


class Dataset(Protocol):
    """A training and a test split, and the batches over them. `structvit_jax.data.load` returns one."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one view of an example: [frames,] size, size, 3."""
        ...

    @property
    def arrays(self) -> Arrays:
        """Shapes and dtypes of one row of a training batch, without `mask` and `index`."""
        ...

    @property
    def unit(self) -> str:
        """Name of the examples in messages: "images" or "clips"."""
        ...

    @property
    def in_files(self) -> bool:
        """Whether the examples are files of the user, whose quality is unknown."""
        ...

    @property
    def train_examples(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int:
        """Training examples times the copies of repeated augmentation."""
        ...

    @property
    def test_examples(self) -> int: ...

    @property
    def test_ids(self) -> tuple[str, ...]:
        """Ids of the test examples, in order."""
        ...

    @property
    def views(self) -> int:
        """Number of views of a test example: clips times crops."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identify the data of both splits, see `structvit_jax.data.fingerprint`."""
        ...

    def train_id(self, index: int) -> str:
        """Return the id of a training example."""
        ...

    def changes_since(self, old: Mapping[str, Fingerprint], *, test_only: bool = False) -> Changes:
        """Compare the data with a fingerprint, on both splits or on the test split alone."""
        ...

    def survey(self) -> Survey:
        """Sample both splits for a few seconds and report what is in them."""
        ...

    def adopt_classes(self, names: Sequence[str]) -> bool:
        """Number the labels in the order of `names`; return whether the data have another order.

        Raises:
          UserError: the data have other classes.
        """
        ...

    def train_batches(self, batch_size: int, *, start_step: int, shard: Shard = WHOLE) -> Generator[Batch]:
        """Yield shuffled batches forever, from step `start_step` on.

        Args:
          batch_size: rows of a batch over all processes.
          start_step: first step; since a batch depends on the seed and its step alone, a run resumes exactly.
          shard: the part of each batch to read.
        """
        ...

    def test_batches(self, batch_size: int, *, shard: Shard = WHOLE) -> Generator[Batch]:
        """Yield every test example once, with all its views, in order; the last batch is padded."""
        ...

    def uncropped_batches(self, batch_size: int, *, start: int) -> Generator[Batch]:
        """Yield every training image once, resized but not cropped, in order, from batch `start` on."""
        ...


@dataclasses.dataclass(frozen=True)
class _Options:
    @classmethod
    def from_config(cls, section: Any) -> Self:
        """Copy the options from a section of a configuration; other keys of the section are ignored."""
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class DataOptions(_Options):
    """The keys of the section `data` that reading depends on; `structvit_jax.config` documents them."""

    name: str
    root: str
    train_split: str
    test_split: str
    val_fraction: float
    train_examples: int
    test_examples: int
    mean: tuple[float, ...] | None
    channels: str
    frames: int
    stride: int
    sampling: str
    size: int
    short_side: int
    crop_fraction: float
    test_clips: int
    test_crops: int
    label_maps: str
    workers: int
    max_pixels: int
    max_frames: int
    max_replaced_frames: float


@dataclasses.dataclass(frozen=True)
class AugmentOptions(_Options):
    """The keys of the section `augment` that apply while reading; the others apply on the device."""

    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]
    flip: float
    color_jitter: float
    randaugment: str
    repeated_augmentation: int
