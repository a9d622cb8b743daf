"""Types and protocols of the data package. Importing them loads no decoder."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, Protocol, Self, TypedDict

import numpy as np
from numpy.typing import DTypeLike

from structvit_jax.utils.failures import DecodeError

if TYPE_CHECKING:
    from structvit_jax.data.fingerprint import Changes, Fingerprint
    from structvit_jax.data.survey import Survey

Arrays = dict[str, tuple[tuple[int, ...], DTypeLike]]  # by key of a batch: shape and dtype of one row


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
    mask: np.ndarray  # bool [rows]; False for padding and unreadable examples, which do not count
    index: np.ndarray  # int32 [rows]; position of the example in its split, -1 for padding
    problems: tuple[Problem, ...]  # unreadable examples, and notes on readable ones
    seconds: dict[str, float]  # time that each of `structvit_jax.data.stages.STAGES` took
    # In training with label maps:
    map_classes: NotRequired[np.ndarray]  # uint16 [rows, map height, map width, k], for the whole image
    map_scores: NotRequired[np.ndarray]  # float16, same shape; probabilities of these classes
    pose: NotRequired[np.ndarray]  # float32 [rows, 2, 3]; maps points of the crop to points of the image


# (host, hosts): the rows of every batch are cut into `hosts` equal blocks, and a process reads block `host`.
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)


class Media(abc.ABC):
    """The frames of an example in display order."""

    count: int  # number of frames, including missing ones
    missing: int = 0  # number of frames at the end that a truncated file lacks
    repaired: int = 0  # in the last `frames` call: damaged frames that were replaced by their neighbours
    # Whether damage was repaired, or concealed by the decoder, in the last `frames` call. Pixels may then
    # depend on which other frames were wanted.
    damaged: bool = False

    @abc.abstractmethod
    def frames(self, wanted: Sequence[int], short_side: int = 0) -> np.ndarray:
        """Return frames by number.

        Args:
          wanted: frame numbers from 0 to `count` - 1, in any order; repetitions are allowed.
          short_side: scale frames with a longer short side down to this; 0 never scales.

        Returns:
          uint8 [len(wanted), height, width, 3], RGB.

        Raises:
          DecodeError: a frame cannot be read.
        """

    def close(self) -> None:  # noqa: B027 - most media have nothing to release
        """Release files and decoders."""

    def check_available(self, wanted: Sequence[int]) -> None:
        """Raise a DecodeError if one of the wanted frames is missing."""
        if (last := max(wanted)) >= self.count - self.missing:
            raise DecodeError(
                f"cut off: {self.missing} of {self.count} frames are missing, including frame {last}"
            )


class Source(Protocol):
    """Random access to the examples of one split, in a fixed order."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """Return the name that reports and predictions print for an example."""
        ...

    def open(self, index: int) -> tuple[Media, int]:
        """Return the frames and the label of an example.

        Raises:
          DecodeError: the example cannot be read.
        """
        ...


class Dataset(Protocol):
    """A training and a test split, and the batches over them. `structvit_jax.data.load` returns one."""

    class_names: tuple[str, ...]
    shape: tuple[int, ...]  # of one view of an example: [frames,] size, size, 3
    arrays: Arrays  # of a training batch, without `mask` and `index`
    views: int  # number of views of a test example: test clips times test crops
    unit: str  # name of the examples in messages: "images" or "clips"
    in_files: bool  # whether the examples are the user's files, which may be damaged or mislabelled
    train_examples: int
    rows_per_epoch: int  # training examples times their copies by repeated augmentation
    test_examples: int

    @property
    def test_ids(self) -> tuple[str, ...]:
        """Ids of the test examples, in order."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprints of both splits by name, see `structvit_jax.data.fingerprint`."""
        ...

    def train_id(self, index: int) -> str:
        """Return the id of a training example."""
        ...

    def changes_since(self, old: Mapping[str, Fingerprint], *, test_only: bool = False) -> Changes:
        """Compare both splits, or only the test split, with the fingerprints in `old`."""
        ...

    def survey(self) -> Survey:
        """Read some examples of both splits for a few seconds and report what they contain."""
        ...

    def adopt_classes(self, names: Sequence[str]) -> bool:
        """Number the labels in the order of `names`, and return whether that changed their numbers.

        Raises:
          UserError: the data have other classes.
        """
        ...

    def start_cache(self) -> str:
        """Keep decoded examples in memory if config.data.cache asks for it.

        Returns:
          One line that states what was decided; "" if there is nothing to state.
        """
        ...

    def train_batches(self, batch_size: int, *, start_step: int, shard: Shard = WHOLE) -> Generator[Batch]:
        """Yield shuffled batches forever, from step `start_step` on.

        A batch depends only on the seed and the step, so a resumed run sees the same batches.

        Args:
          batch_size: number of rows over all processes.
          start_step: first step.
          shard: the rows of each batch to read.
        """
        ...

    def test_batches(self, batch_size: int, *, shard: Shard = WHOLE) -> Generator[Batch]:
        """Yield every test example once, with all its views, in order; the last batch is padded."""
        ...

    def uncropped_batches(self, batch_size: int, *, start: int) -> Generator[Batch]:
        """Yield every training image once, resized without cropping, in order, from batch `start` on."""
        ...


@dataclasses.dataclass(frozen=True)
class _Options:
    @classmethod
    def from_config(cls, section: Any) -> Self:
        """Copy the options from a section of a configuration; ignore its other keys."""
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class DataOptions(_Options):
    """The keys of the section `data` that affect reading; `structvit_jax.config` documents them."""

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
    cache: str
    cache_gib: float
    max_pixels: int
    max_frames: int
    max_replaced_frames: float


@dataclasses.dataclass(frozen=True)
class AugmentOptions(_Options):
    """The keys of the section `augment` that are applied while reading; the others apply on the device."""

    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]
    flip: float
    color_jitter: float
    randaugment: str
    repeated_augmentation: int
