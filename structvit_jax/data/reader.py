"""From an example to the model's input: sample frames, decode them, then augment or crop."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.data import frame_operations, pixels, sampling
from structvit_jax.data.augment import (
    RandAugment,
    RandomCrop,
    draw_color_jitter,
    draw_crop,
    resize,
    test_boxes,
    test_crops,
)
from structvit_jax.data.cached_source import CachedSource
from structvit_jax.data.frame_operations import CropAffine, Operation
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


class Augmentation(NamedTuple):
    """What was drawn for one copy of a training example."""

    operations: list[Operation]
    crop: RandomCrop


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
        if self.is_image or self._policy or augment.color_jitter:
            pixels.prepare()  # before worker processes need it
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

    def train(
        self, epoch: int, index: int, copies: range, inputs: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Read copies of an example for training.

        Args:
          epoch: number of the epoch.
          index: number of the example.
          copies: numbers of the copies.
          inputs: memory for the pixels, uint8 [len(copies), *shape]; None: new memory.

        Returns:
          A value for each key of `arrays`: a list with one entry per copy, or one value that all copies
          share. And "notes", which maps `Problem.kind` to `Problem.reason`.

        Raises:
          DecodeError: the example cannot be read.
        """
        media, label = self._open(index)
        with contextlib.closing(media):
            if media.count == 1:  # every rule repeats the only frame: no random generator is needed
                picked = np.zeros(max(self.data.frames, 1), np.int64)
            else:
                picked = self.frames(media.count, self.generator(1, epoch, index))
            clip = self.decode(media, [picked])[0]
            notes = self._notes(media)
        drawn = [self.draw(clip.shape[1:3], self.generator(2, epoch, index, copy)) for copy in copies]
        if inputs is None:
            inputs = np.empty((len(copies), *self.shape), np.uint8)
        for one, out in zip(drawn, inputs, strict=True):
            self.transform(clip, one, out)
        example = {"inputs": inputs, "labels": self._label[label], "notes": notes}
        if self.maps:
            classes, scores = self.maps.read(index)
            example |= {"map_classes": np.array(self._label)[classes], "map_scores": scores}
            example |= {"pose": [self.affine(one)[:2] for one in drawn]}
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
        inputs = resize(picture[0], size, image=True)[None]
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
        words = (self.seed, *path, 1)  # ends in 1: NumPy ignores trailing zeros
        return np.random.default_rng(np.array(words, np.uint32))  # twice as fast as from a tuple

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
        distinct = sorted({frame for clip in clips for frame in clip.tolist()})
        with stage("decode"):
            pictures = media.frames(distinct, self.data.short_side if short_side is None else short_side)
        height, width = pictures.shape[1:3]
        scaled = int(self.data.size / self.data.crop_fraction) ** 2 * max(height, width) // min(height, width)
        if scaled > self.data.max_pixels:
            raise DecodeError(
                f"{width} x {height} pixels: resized for the model's input of size {self.data.size}, it would"
                f" have {scaled} pixels, more than --config.data.max_pixels={self.data.max_pixels} allows"
            )
        if self.data.channels == "bgr":
            pictures = np.ascontiguousarray(pictures[..., ::-1])
        if len(clips) == 1 and len(distinct) == len(clips[0]):
            return [pictures]
        return [pictures[np.searchsorted(distinct, clip)] for clip in clips]

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

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Augmentation:
        """Draw the augmentation of frames of this size (height, width).

        Clips are augmented before the crop, as in UniFormer; images after it, as in timm.
        """
        if self.is_image:
            crop = self._draw_crop(size, rng)
            return Augmentation(self._draw_operations((self.data.size, self.data.size), rng), crop)
        drawn = self._draw_operations(size, rng)
        return Augmentation(drawn, self._draw_crop(size, rng))

    def _draw_operations(self, size: tuple[int, int], rng: np.random.Generator) -> list[Operation]:
        drawn: list[Operation] = []
        if self._policy is not None:
            means = self.data.mean if self.is_image and self.data.mean else (0.5, 0.5, 0.5)
            red, green, blue = (round(255 * mean) for mean in means)
            drawn += self._policy.draw(size, (red, green, blue), rng)
        if self.augment.color_jitter:
            drawn += draw_color_jitter(self.augment.color_jitter, rng)
        return drawn

    def _draw_crop(self, size: tuple[int, int], rng: np.random.Generator) -> RandomCrop:
        options = self.augment
        return draw_crop(size, options.crop_area, options.crop_aspect, options.flip, rng)

    def transform(self, clip: np.ndarray, drawn: Augmentation, out: np.ndarray) -> None:
        """Augment and crop one clip for training, and write it to `out`, uint8 [*shape]."""
        size, crop = (self.data.size, self.data.size), drawn.crop
        out = out.reshape(len(clip), *size, 3)
        if not self.is_image:
            with stage("augment"):
                clip = frame_operations.apply(drawn.operations, clip, crop.box)
        else:
            top, left, height, width = crop.box
            clip = clip[:, top : top + height, left : left + width]
        with stage("crop"):
            for frame, target in zip(clip, out, strict=True):
                target[:] = resize(frame, size, image=self.is_image, mirrored=crop.mirrored)
        if self.is_image and drawn.operations:
            with stage("augment"):
                out[:] = frame_operations.apply(drawn.operations, out, (0, 0, *size))

    def affine(self, drawn: Augmentation) -> CropAffine:
        """Return the affine map from augmented pixels to the frame."""
        crop = drawn.crop.affine()
        if self.is_image:
            return crop @ frame_operations.affine(drawn.operations, (self.data.size, self.data.size))
        return frame_operations.affine(drawn.operations, drawn.crop.size) @ crop
