"""Read shards, and image data sets of TFDS, from ArrayRecord files. This needs TFDS but not tensorflow."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from structvit_jax.data.limits import Limits
from structvit_jax.data.media import FrameRange, Pictures
from structvit_jax.data.types import Media
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, decoding, parse_json

# Feature classes that files may name. For any other name, TFDS would import the module in it.
_FEATURES = {
    f"{getattr(tfds.features, name).__module__}.{name}"
    for name in ("BBoxFeature", "ClassLabel", "FeaturesDict", "Image", "Scalar", "Sequence", "Tensor", "Text")
}
FEATURES_FILE = "features.json"  # TFDS's description of a record
_DESCRIPTIONS = (FEATURES_FILE, "dataset_info.json")  # files that name feature classes
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")  # keys of such names


class _Records:
    """One split of a prepared TFDS data set; every process opens the files itself."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, limits: Limits):
        self._folder, self._split, self._limits = os.fspath(builder.data_path), split, limits
        features = builder.info.features
        label = features["label"] if isinstance(features, tfds.features.FeaturesDict) else None
        if not isinstance(label, tfds.features.ClassLabel):
            raise UserError(f"the examples in {self._folder} have no feature 'label' of type ClassLabel")
        self.class_names: tuple[str, ...] = tuple(label.names)
        try:
            self._examples: int = builder.info.splits[
                split
            ].num_examples  # `split` may be a slice such as "train[:75%]"
        except (KeyError, ValueError, AttributeError) as error:
            known = ", ".join(builder.info.splits)
            raise UserError(
                f"{builder.info.name} has no split {split!r}, only {known}; choose splits with"
                " --config.data.train_split and --config.data.test_split"
            ) from error

    def __len__(self) -> int:
        return self._examples

    @functools.cached_property
    def _records(self) -> Sequence[Mapping[str, Any]]:
        builder = tfds.builder_from_directory(self._folder)
        encoded = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
        return builder.as_data_source(self._split, decoders=encoded)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}


class Shards(_Records):
    """Shards of `structvit_jax.data.tfds_writer`, in the order of the index from which they were written.

    Raises:
      UserError: the list of ids is missing or incomplete.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, limits: Limits):
        super().__init__(builder, split, limits)
        path = os.path.join(self._folder, ids_file(split))
        try:
            with open(path, encoding="utf-8") as file:
                self._ids = np.array([line.rstrip("\n").encode() for line in file])
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); write the shards again") from error
        if len(self._ids) != len(self):
            raise UserError(f"{path} has {len(self._ids)} lines for {len(self)} examples; write it again")

    def id(self, index: int) -> str:
        return self._ids[index].decode()

    @property
    def is_video(self) -> bool:
        """Whether the first readable example is a video or a folder of frames."""
        for index in range(min(len(self), 16)):
            with contextlib.suppress(DecodeError):
                record = self._record(index)
                return record["kind"] == b"video" or len(record["files"]) > 1
        return True

    def stored(self, index: int) -> tuple[str, Sequence[str | bytes] | None]:
        """Return the label of an example and the contents of its files, or None for a part of a file."""
        record = self._record(index)
        files = list(record["files"]) if record["count"] < 0 else None
        return self.class_names[self._label(record)], files

    def _record(self, index: int) -> Mapping[str, Any]:
        with decoding():  # a damaged record raises RuntimeError
            record = self._records[index]
            problem = record["problem"].decode()
        if problem:
            raise DecodeError(problem)
        return record

    def _label(self, record: Mapping[str, Any]) -> int:
        if not 0 <= record["label"] < len(self.class_names):
            raise DecodeError(f"label {record['label']}, but there are {len(self.class_names)} classes")
        return int(record["label"])

    def open(self, index: int) -> tuple[Media, int]:
        """Return the frames and the label of an example.

        Raises:
          DecodeError: the example cannot be read, or could not when the shards were written.
        """
        record = self._record(index)
        with decoding():
            label, files = self._label(record), list(record["files"])
            if record["kind"] != b"video":
                return Pictures(files, self._limits), label
            media = VideoFile(files[0], limits=self._limits)
            if record["count"] < 0:
                return media, label
            first, count, missing = (int(record[key]) for key in ("first", "count", "missing"))
            if not (first >= 0 and 0 <= missing <= count and first + count - missing <= media.count):
                media.close()
                raise DecodeError(
                    f"frames {first} to {first + count - missing} of a file of {media.count} frames"
                )
            self._limits.check_frames(count)
            return FrameRange(media, first, count, missing), label


def ids_file(split: str) -> str:
    """Return the name of the file beside shards that lists their ids, so that no clip has to be read."""
    return f"ids-{split}.txt"


class Images(_Records):
    """An image classification set of TFDS, in its stored order. It stores no ids, so they are positions."""

    def id(self, index: int) -> str:
        return f"{self._split}/{index}"

    def stored(self, index: int) -> tuple[str, Sequence[str | bytes] | None]:
        """Return the label of an example and the content of its file."""
        with decoding():
            record = self._records[index]
        label = int(record["label"])
        return self.class_names[label] if label >= 0 else "", [record["image"]]

    def open(self, index: int) -> tuple[Media, int]:
        """Return the image and the label of an example.

        Raises:
          DecodeError: the image cannot be read, or has no label.
        """
        with decoding():  # a damaged record raises RuntimeError
            record = self._records[index]
            if record["label"] < 0:
                raise DecodeError("has no label")
            return Pictures([record["image"]], self._limits), int(record["label"])


def open_shards(folder: str, train: str, test: str, limits: Limits) -> tuple[Shards, Shards]:
    """Open the two splits of a folder of shards.

    Raises:
      UserError: there are no shards, or they are damaged.
    """
    _check_features(folder)
    try:
        with decoding():
            builder = tfds.builder_from_directory(folder)
    except DecodeError as error:
        raise UserError(f"{folder} has no shards that can be read: {error}") from error
    return Shards(builder, train, limits), Shards(builder, test, limits)


def open_images(name: str, root: str, train: str, test: str, limits: Limits) -> tuple[Images, Images]:
    """Open the two splits of a TFDS data set, such as "imagenet2012" or "imagenette/160px-v2".

    Args:
      name: name of the data set, with its configuration if it has several.
      root: TFDS's data_dir; "" means ~/tensorflow_datasets.
      train, test: names of its splits.
      limits: limits on the images.

    Raises:
      UserError: the data set is unknown, not prepared as ArrayRecord, or has no images with labels.
    """
    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name):
        raise UserError(f"tfds:{name} is not NAME, NAME/CONFIG or NAME/CONFIG:VERSION of a data set of TFDS")
    where = root or os.path.join("~", "tensorflow_datasets")
    top = os.path.join(os.path.expanduser(where), re.split("[:/]", name)[0])
    for folder, _, _ in os.walk(top):
        _check_features(folder)
    builder, reason = None, "no files"
    try:
        builder = tfds.builder(name, data_dir=root or None, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if not (builder and builder.info.splits):
        command = f"tfds build {name} --file_format=array_record" + (f" --data_dir={root}" if root else "")
        raise UserError(
            f"{name} is not prepared as ArrayRecord in {where} ({reason}): run `{command}` once. It needs"
            " tensorflow (pip install tensorflow); training does not"
        )
    features = dict(builder.info.features)
    if "image" not in features or not hasattr(features.get("label"), "names"):
        raise UserError(f"{name} is not an image classification set; its features are {', '.join(features)}")
    return Images(builder, train, limits), Images(builder, test, limits)


def _check_features(folder: str) -> None:
    """Check the feature classes that the description of a data set names, before TFDS imports their modules.

    Raises:
      UserError: a class is not in `_FEATURES`, or a file is not JSON.
    """
    for path in (os.path.join(folder, name) for name in _DESCRIPTIONS):
        try:
            with open(path, encoding="utf-8") as file:
                names = set(_named_classes(parse_json(file.read())))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
        if foreign := sorted(names - _FEATURES):
            raise UserError(
                f"{path} names {foreign[0][:80]!r}, which is not a feature of shards or image sets; write the"
                " shards again with structvit prepare shards"
            )


def _named_classes(value: Any) -> Iterator[str]:
    """Yield the feature classes that a JSON document names."""
    if isinstance(value, dict):
        for key in _CLASS_KEYS:
            if isinstance(text := value.get(key), str) and ("." in text or key != "type"):
                yield text
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _named_classes(item)
