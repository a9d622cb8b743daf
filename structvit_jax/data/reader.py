"""From an example to the model's input: sample frames, decode them, then augment or crop."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from structvit_jax.data.cached_source import CachedSource
from structvit_jax.data.label_maps import LabelMaps
from structvit_jax.data.stages import stage
from structvit_jax.data.types import Arrays, AugmentOptions, DataOptions, Media, Source
from structvit_jax.utils.failures import DecodeError

UNCROPPED_SIDE = 720  # pixels; larger uncropped frames are scaled down to this short side


class Crop(NamedTuple):
    """A box in a frame, in fractions of the height and width of the frame."""

    top: float
    left: float
    height: float
    width: float


class Reader:
    """Read the examples of a source according to the sections `data` and `augment` of a configuration.

    Random draws depend only on (seed, epoch, example, copy). Copies of an example in repeated augmentation
    share their frames, and each copy has its own crop and augmentation.

    Attributes:
      class_names: classes in the order of the labels.
      is_image: whether examples are images rather than clips.
      shape: shape of one view of an example: [frames,] size, size, 3.
      views: number of views of a test example, whose scores are averaged.
      middle: index of the middle view: the middle crop of the middle clip.
      arrays: shapes and dtypes of one training example.
      cached: the examples of `source` through a cache; None without a cache.

    Raises:
      UserError: the sampling rule or the augmentation policy is unknown.
    """

    def __init__(
        self,
        source: Source,
        data: DataOptions,
        augment: AugmentOptions,
        seed: int,
        maps: LabelMaps | None = None,
    ):
        self.source, self.data, self.augment, self.seed, self.maps = source, data, augment, seed, maps
        self.cached: CachedSource | None = None
        self._rule = sampling.rule(data.sampling)
        self._policy = RandAugment.parse(augment.randaugment)
        self.class_names = source.class_names
        self._label = list(range(len(self.class_names)))  # label of each class of the source
        self.is_image = data.frames == 0
        size = (data.size, data.size, 3)
        self.shape: tuple[int, ...] = size if self.is_image else (data.frames, *size)
        self.views = data.test_clips * data.test_crops
        self.middle = data.test_clips // 2 * data.test_crops + data.test_crops // 2
        self.arrays: Arrays = {"inputs": (self.shape, np.uint8), "labels": ((), np.int32)}
        if maps:
            self.arrays |= {"map_classes": (maps.shape, np.uint16), "map_scores": (maps.shape, np.float16)}
            self.arrays |= {"pose": ((2, 3), np.float32)}

    def adopt_classes(self, names: Sequence[str], order: Sequence[int]) -> None:
        """Number the classes as in `names`, where class i of the source has the number order[i]."""
        self._label = list(order)
        self.class_names = tuple(names)

    def train(self, epoch: int, index: int, copies: range) -> dict[str, Any]:
        """Read copies of an example for training.

        Returns:
          A value for each key of `arrays`: a list with one entry per copy, or one value that all copies
          share. And "notes", which maps `Problem.kind` to `Problem.reason`.

        Raises:
          DecodeError: the example cannot be read.
        """
        media, label = self._open(index)
        with contextlib.closing(media):
            if media.count == 1:  # every rule repeats the only frame, so images need no random generator
                picked = np.zeros(max(self.data.frames, 1), np.int64)
            else:
                picked = self.frames(media.count, self.generator(1, epoch, index))
            clip = self.decode(media, [picked])[0]
            notes = self._notes(media)
        drawn = [self.transform(clip, self.generator(2, epoch, index, copy)) for copy in copies]
        example = {"inputs": [pixels for pixels, _ in drawn], "labels": self._label[label], "notes": notes}
        if self.maps:
            classes, scores = self.maps.read(index)
            example |= {"map_classes": np.array(self._label)[classes], "map_scores": scores}
            example |= {"pose": [affine[:2] for _, affine in drawn]}
        return example

    def test(self, index: int) -> dict[str, Any]:
        """Read all views of an example for testing, clip by clip.

        Returns:
          "inputs", uint8 [views, *shape]; "labels" and "notes" as in `train`.

        Raises:
          DecodeError: the example cannot be read.
        """
        options = self.data
        media, label = self._open(index)
        with contextlib.closing(media):
            total = options.test_clips
            picked = [self.frames(media.count, (clip, total)) for clip in range(total)]
            clips = self.decode(media, picked)
            size, fraction, crops = options.size, options.crop_fraction, options.test_crops
            with stage("crop"):
                views = [test_crops(clip, size, fraction, crops, image=self.is_image) for clip in clips]
            notes = self._notes(media)
        inputs = np.concatenate(views).reshape(self.views, *self.shape)
        return {"inputs": inputs, "labels": self._label[label], "notes": notes}

    def resized(self, index: int) -> dict[str, Any]:
        """Read an image without cropping it, resized to the size that the model sees.

        Returns:
          "inputs", uint8 [1, size, size, 3]; "labels" as in `train`; and empty "notes".

        Raises:
          DecodeError: the example cannot be read.
        """
        media, label = self._open(index)
        with contextlib.closing(media):
            picture = self.decode(media, [np.array([0])])[0]
        size = (self.data.size, self.data.size)
        inputs = resize(picture, (0, 0, *picture.shape[1:3]), size, image=True)
        return {"inputs": inputs, "labels": self._label[label], "notes": {}}

    def uncropped(self, index: int) -> tuple[np.ndarray, Crop]:
        """Return the uncropped frames of the middle clip, and the box of the middle view in them.

        Returns:
          The frames, uint8 [time, height, width, 3], always RGB, with short sides up to `UNCROPPED_SIDE`; and
          the box.

        Raises:
          DecodeError: the example cannot be read.
        """
        media, _ = self._open(index)
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

    def generator(self, *path: int) -> np.random.Generator:
        """Return the random generator for a purpose (1: frames, 2: pixels), epoch, example and copy."""
        return np.random.default_rng((self.seed, *path, 1))  # ends in 1: NumPy ignores trailing zeros

    def frames(self, count: int, draw: sampling.Draw) -> np.ndarray:
        """Choose frames for one clip of a video with `count` frames: int64 [frames]."""
        return self._rule(count, max(self.data.frames, 1), self.data.stride, draw)

    def decode(
        self, media: Media, clips: list[np.ndarray], short_side: int | None = None
    ) -> list[np.ndarray]:
        """Return the frames of several clips, decoding each frame once.

        Args:
          media: the frames of an example.
          clips: frame numbers of each clip; all clips have the same length.
          short_side: see `Media.frames`; None means config.data.short_side.

        Raises:
          DecodeError: a frame cannot be read, or is so elongated that resizing its short side for the model
            would exceed config.data.max_pixels.
        """
        distinct, positions = np.unique(np.concatenate(clips), return_inverse=True)
        with stage("decode"):
            pictures = media.frames(
                distinct.tolist(), self.data.short_side if short_side is None else short_side
            )
        height, width = pictures.shape[1:3]
        scaled = int(self.data.size / self.data.crop_fraction) ** 2 * max(height, width) // min(height, width)
        if scaled > self.data.max_pixels:
            raise DecodeError(
                f"{width} x {height} pixels: resized for the model's input of size {self.data.size}, it would"
                f" have {scaled} pixels, more than --config.data.max_pixels={self.data.max_pixels} allows"
            )
        if self.data.channels == "bgr":
            pictures = pictures[..., ::-1]
        return [pictures[clip] for clip in positions.reshape(len(clips), -1)]

    def _open(self, index: int) -> tuple[Media, int]:
        with stage("open"):
            return (self.cached or self.source).open(index)

    def _notes(self, media: Media) -> dict[str, str]:
        """Return notes on an example that was read: `Problem.reason` by `Problem.kind`."""
        notes = {}
        if media.repaired:
            frames = "1 frame" if media.repaired == 1 else f"{media.repaired} frames"
            notes["repaired"] = f"{frames} could not be decoded, replaced by the nearest"
        if media.count < self.data.frames:
            notes["short"] = f"fewer than the {self.data.frames} frames of a clip"
        return notes

    def transform(self, clip: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, CropAffine]:
        """Augment one clip for training; return its pixels and the affine map from them to the clip.

        Clips are augmented before the crop, as in UniFormer; images after it, as in timm.
        """
        first, second = (self._crop, self._randaugment) if self.is_image else (self._randaugment, self._crop)
        clip, affine = first(clip, rng)
        clip, after = second(clip, rng)
        return clip.reshape(self.shape), affine @ after

    def _randaugment(self, clip: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, CropAffine]:
        affine = np.eye(3)
        with stage("augment"):
            if self._policy is not None:
                means = self.data.mean if self.is_image and self.data.mean else (0.5, 0.5, 0.5)
                red, green, blue = (round(255 * mean) for mean in means)
                clip, affine = self._policy(clip, (red, green, blue), rng)
            if self.augment.color_jitter:
                clip = color_jitter(clip, self.augment.color_jitter, rng)
            return clip, affine

    def _crop(self, clip: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, CropAffine]:
        area, aspect, flip = self.augment.crop_area, self.augment.crop_aspect, self.augment.flip
        with stage("crop"):
            return random_crop(clip, self.data.size, area, aspect, flip, rng, image=self.is_image)
