"""From an example to the array that a model sees: sample frames, decode them, augment or crop."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from structvit_jax.data import sampling
from structvit_jax.data.augment import (
    CropAffine,
    RandAugment,
    color_jitter,
    random_crop,
    resize,
    test_boxes,
    test_crops,
)
from structvit_jax.data.label_maps import LabelMaps
from structvit_jax.data.media import Media
from structvit_jax.utils.errors import DecodeError

Arrays = dict[str, tuple[tuple[int, ...], type]]  # shapes and types, by key of a batch
UNCROPPED_SIDE = 720  # pixels: longer short sides of uncropped frames are scaled to this


class Crop(NamedTuple):
    """A box in a frame, in fractions of the frame's sides."""

    top: float
    left: float
    height: float
    width: float


class Source(Protocol):
    """Random access to one split, in its fixed order."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def open(self, index: int) -> tuple[Media, int]:
        """An example's frames and label.

        Raises:
          DecodeError: it cannot be read.
        """
        ...


class Reader:
    """Reads examples as the sections `data` and `augment` of a configuration say.

    Every random draw is a function of (seed, epoch, example): frames are drawn once for all copies of an
    example, pixels once for each.

    Raises:
      UserError: a sampling rule or policy that does not exist.
    """

    def __init__(self, source: Source, data: Any, augment: Any, seed: int, maps: LabelMaps | None = None):
        self.maps = maps
        self.source, self.data, self.augment, self.seed = source, data, augment, seed
        self._rule = sampling.rule(data.sampling)
        self._policy = RandAugment.parse(augment.randaugment)
        self.class_names = source.class_names
        self._number = list(range(len(self.class_names)))  # of each of the source's classes

    def adopt_classes(self, names: Sequence[str], order: Sequence[int]) -> None:
        """Number the classes as in `names`; `order` is the number of each of the source's classes there."""
        self._number = list(order)
        self.class_names = tuple(names)

    @property
    def is_image(self) -> bool:
        return self.data.frames == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one view of an example: [frames,] size, size, 3."""
        size = self.data.size
        return (size, size, 3) if self.is_image else (self.data.frames, size, size, 3)

    @property
    def views(self) -> int:
        """How many views of an example are averaged in testing."""
        return self.data.test_clips * self.data.test_crops

    @property
    def middle(self) -> int:
        """Which of the views is the middle crop of the middle clip."""
        return self.data.test_clips // 2 * self.data.test_crops + self.data.test_crops // 2

    @property
    def arrays(self) -> Arrays:
        """Of what a training example has."""
        own: Arrays = {"inputs": (self.shape, np.uint8), "labels": ((), np.int32)}
        if self.maps:
            shape = self.maps.shape
            own |= {"map_classes": (shape, np.uint16), "map_scores": (shape, np.float16)}
            own |= {"pose": ((2, 3), np.float32)}
        return own

    def train(self, epoch: int, index: int, copies: range) -> dict[str, Any]:
        """Read copies of an example for training, each with its own augmentation, as `arrays` says.

        The label comes once, and "notes" where there are any: kinds of `Problem` with their reasons.

        Raises:
          DecodeError: the example cannot be read.
        """
        media, label = self.source.open(index)
        with contextlib.closing(media):
            picked = self._drawn(media.count, epoch, index)
            clip = self.decode(media, [picked])[0]
            notes = self._notes(media)
        drawn = [self.transform(clip, self.generator(2, epoch, index, copy)) for copy in copies]
        read: dict[str, Any] = {"inputs": [pixels for pixels, _ in drawn], "labels": self._number[label]}
        read |= notes
        if self.maps:
            classes, scores = self.maps.read(index)
            read |= {"map_classes": np.array(self._number)[classes], "map_scores": scores}
            read |= {"pose": [pose[:2] for _, pose in drawn]}
        return read

    def test(self, index: int) -> dict[str, Any]:
        """Read all views of an example, clip by clip (uint8 [views, *shape]), as `train` otherwise."""
        media, label = self.source.open(index)
        with contextlib.closing(media):
            clips = range(self.data.test_clips)
            picked = [self.frames(media.count, (clip, len(clips))) for clip in clips]
            views = [self.crops(clip) for clip in self.decode(media, picked)]
            notes = self._notes(media)
        return {
            "inputs": np.concatenate(views).reshape(self.views, *self.shape),
            "labels": self._number[label],
            **notes,
        }

    def uncropped(self, index: int) -> tuple[np.ndarray, Crop]:
        """Return the frames of the middle clip as recorded, and the part of them in the middle view.

        Returns:
          uint8 [time, height, width, 3], RGB, with short sides up to `UNCROPPED_SIDE`, and the crop.

        Raises:
          DecodeError: the example cannot be read.
        """
        media, _ = self.source.open(index)
        with contextlib.closing(media):
            clips = self.data.test_clips
            picked = self.frames(media.count, (clips // 2, clips))
            height, width = self.decode(media, [picked[:1]])[0].shape[1:3]
            frames = self.decode(media, [picked], short_side=UNCROPPED_SIDE)[0]
        new, corners = test_boxes(
            height, width, self.data.size, self.data.crop_fraction, self.data.test_crops, image=self.is_image
        )
        top, left = corners[len(corners) // 2]
        crop = Crop(top / new[0], left / new[1], self.data.size / new[0], self.data.size / new[1])
        return frames[..., ::-1] if self.data.channels == "bgr" else frames, crop

    def whole(self, index: int) -> dict[str, Any]:
        """An image as a whole, brought to the size that the model sees, and its label; errors as `train`."""
        media, label = self.source.open(index)
        with contextlib.closing(media):
            picture = self.decode(media, [np.array([0])])[0]
        size = (self.data.size, self.data.size)
        inputs = resize(picture, (0, 0, *picture.shape[1:3]), size, image=True)
        return {"inputs": inputs, "labels": self._number[label]}

    def generator(self, *path: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *path, 1))  # trailing zeros would not count

    def _drawn(self, count: int, epoch: int, index: int) -> np.ndarray:
        """Return the frame numbers of one clip for training."""
        if count == 1:  # every rule repeats the only frame, and images are spared a generator
            return np.zeros(max(self.data.frames, 1), np.int64)
        return self.frames(count, self.generator(1, epoch, index))

    def frames(self, count: int, draw: sampling.Draw) -> np.ndarray:
        """The frame numbers of one clip."""
        return self._rule(count, max(self.data.frames, 1), self.data.stride, draw)

    def decode(
        self, media: Media, clips: list[np.ndarray], short_side: int | None = None
    ) -> list[np.ndarray]:
        """Return the frames of several clips, each decoded once; by default scaled as configured.

        Raises:
          DecodeError: one cannot be read, or is too elongated to be scaled to the model's size.
        """
        distinct, places = np.unique(np.concatenate(clips), return_inverse=True)
        pictures = media.frames(distinct.tolist(), self.data.short_side if short_side is None else short_side)
        height, width = pictures.shape[1:3]
        scaled = int(self.data.size / self.data.crop_fraction) ** 2 * max(height, width) // min(height, width)
        if scaled > self.data.max_pixels:
            raise DecodeError(
                f"{width} x {height} pixels: scaled to the model's {self.data.size} the long side would take"
                f" {scaled} pixels, more than --config.data.max_pixels={self.data.max_pixels} allows"
            )
        if self.data.channels == "bgr":
            pictures = pictures[..., ::-1]
        return [pictures[place] for place in places.reshape(len(clips), -1)]

    def _notes(self, media: Media) -> dict[str, dict[str, str]]:
        """Return notes on an example that was read, under the key "notes"; {} if there are none."""
        notes = {}
        if media.repaired:
            frames = "1 frame" if media.repaired == 1 else f"{media.repaired} frames"
            notes["repaired"] = f"{frames} could not be decoded, replaced by the nearest"
        if media.count < self.data.frames:
            notes["short"] = f"fewer than the {self.data.frames} frames of a clip"
        return {"notes": notes} if notes else {}

    def transform(self, clip: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, CropAffine]:
        """The augmentation of one clip for training, and whence its pixels come: RandAugment on whole frames
        and then the crop, as UniFormer; of an image the crop first, as timm."""
        first, second = (self._crop, self._alter) if self.is_image else (self._alter, self._crop)
        clip, pose = first(clip, rng)
        clip, after = second(clip, rng)
        return clip.reshape(self.shape), pose @ after

    def _alter(self, clip, rng):
        means = self.data.mean if self.is_image and self.data.mean else (0.5, 0.5, 0.5)
        red, green, blue = (round(255 * mean) for mean in means)
        pose = np.eye(3)
        if self._policy is not None:
            clip, pose = self._policy(clip, (red, green, blue), rng)
        if self.augment.color_jitter:
            clip = color_jitter(clip, self.augment.color_jitter, rng)
        return clip, pose

    def _crop(self, clip, rng):
        area, aspect, flip = self.augment.crop_area, self.augment.crop_aspect, self.augment.flip
        return random_crop(clip, self.data.size, area, aspect, flip, rng, image=self.is_image)

    def crops(self, clip: np.ndarray) -> np.ndarray:
        """The crops of one clip for testing: [crops, time, size, size, 3]."""
        size, fraction, crops = self.data.size, self.data.crop_fraction, self.data.test_crops
        return test_crops(clip, size, fraction, crops, image=self.is_image)
