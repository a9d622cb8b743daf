"""Examples in ArrayRecord files, written and read through TFDS without tensorflow: shards, and image sets."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from structvit_jax.data.index import Index
from structvit_jax.data.media import Media, Part, Pictures, frame_names
from structvit_jax.data.video import VideoFile
from structvit_jax.errors import DecodeError, UserError, decoding


class _Records:
    """One split of a prepared TFDS data set; every process opens its files for itself."""

    def __init__(self, builder: Any, split: str):
        self._builder_dir, self._split = os.fspath(builder.data_path), split
        self.class_names: tuple[str, ...] = tuple(builder.info.features["label"].names)
        self._examples: int = _known_split(builder, split).num_examples

    def __len__(self) -> int:
        return self._examples

    @functools.cached_property
    def _records(self):
        builder = tfds.builder_from_directory(self._builder_dir)
        as_they_are = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
        return builder.as_data_source(self._split, decoders=as_they_are)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}


class Shards(_Records):
    """What `write_shards` wrote, in the order of the index that it was made from."""

    def __init__(self, builder: Any, split: str):
        super().__init__(builder, split)
        with open(os.path.join(self._builder_dir, _ids_file(split)), encoding="utf-8") as file:
            self._ids = np.array([line.rstrip("\n").encode() for line in file])

    def id(self, index: int) -> str:
        return self._ids[index].decode()

    @property
    def is_video(self) -> bool:
        """Whether the first readable example is a video or a folder of frames."""
        for index in range(min(len(self), 16)):
            with contextlib.suppress(DecodeError), decoding():
                record = self._records[index]
                if not record["problem"]:
                    return record["kind"] == b"video" or len(record["files"]) > 1
        return True

    def stored(self, index: int) -> tuple[str, Sequence[str | bytes] | None]:
        """Return an example's label and its files' contents; None in their place for a part of a file."""
        with decoding():
            record = self._records[index]
        if problem := record["problem"].decode():
            raise DecodeError(problem)
        files = list(record["files"]) if record["count"] < 0 else None
        return self.class_names[int(record["label"])], files

    def open(self, index: int) -> tuple[Media, int]:
        record = self._records[index]
        if problem := record["problem"].decode():
            raise DecodeError(problem)
        files = list(record["files"])
        media: Media = VideoFile(files[0]) if record["kind"] == b"video" else Pictures(files)
        if record["count"] >= 0:
            media = Part(media, *(int(record[key]) for key in ("first", "count", "missing")))
        return media, int(record["label"])


def _ids_file(split: str) -> str:
    """Beside the shards, so that ids are known without reading clips."""
    return f"ids-{split}.txt"


class Images(_Records):
    """An image classification set of TFDS, in its stored order: its ids are not known without reading it."""

    def id(self, index: int) -> str:
        return f"{self._split}/{index}"

    def stored(self, index: int) -> tuple[str, Sequence[str | bytes] | None]:
        """Return an example's label and the contents of its file."""
        with decoding():
            record = self._records[index]
        label = int(record["label"])
        return self.class_names[label] if label >= 0 else "", [record["image"]]

    def open(self, index: int) -> tuple[Media, int]:
        record = self._records[index]
        if record["label"] < 0:
            raise DecodeError("has no label")
        return Pictures([record["image"]]), int(record["label"])


def find_shards(root: str) -> str | None:
    """The folder below `root` (or itself) that holds our shards."""
    folders = [os.path.join(root, "clips", "1.0.0"), root]
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, "features.json"))), None)


def open_shards(folder: str, train: str, test: str) -> tuple[Shards, Shards]:
    """The two splits of a folder of shards."""
    builder = tfds.builder_from_directory(folder)
    return tuple(Shards(builder, split) for split in (train, test))  # type: ignore


def open_images(name: str, root: str, train: str, test: str) -> tuple[Images, Images]:
    """The two splits of a TFDS data set, as "imagenet2012" or "imagenette/160px-v2".

    Args:
      name: of the data set, with its configuration if it has several.
      root: TFDS's data_dir; "" is ~/tensorflow_datasets.
      train, test: names of its splits.

    Raises:
      UserError: an unknown data set, or one that is not prepared as ArrayRecord, or has no images and labels.
    """
    where = root or os.path.join("~", "tensorflow_datasets")
    prepare = f"tfds build {name} --file_format=array_record" + (f" --data_dir={root}" if root else "")
    try:
        builder = tfds.builder(name, data_dir=root or None, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"TFDS finds no data set {name!r} prepared in {where} ({reason[:200]}); prepare it once with"
            f" `{prepare}`, which needs tensorflow: pip install tensorflow"
        ) from error
    if not builder.info.splits:
        raise UserError(
            f"{name} is not prepared as ArrayRecord in {where}: run `{prepare}` once, which needs tensorflow"
            " (pip install tensorflow); training does not"
        )
    features = dict(builder.info.features)
    if "image" not in features or not hasattr(features.get("label"), "names"):
        raise UserError(f"{name} is no image classification set; its features are {', '.join(features)}")
    return tuple(Images(builder, split) for split in (train, test))  # type: ignore


def _known_split(builder, split: str) -> Any:
    """A split, or a part of one as TFDS writes it: "train[:75%]"."""
    try:
        return builder.info.splits[split]
    except (KeyError, ValueError, AttributeError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(
            f"{builder.info.name} has no split {split!r} but {known}; name it with"
            " --config.data.train_split and --config.data.test_split"
        ) from error


Record = dict[str, Any]


class Clips(tfds.core.GeneratorBasedBuilder):
    """Writes encoded clips or images in the order of an index, which is what keys count."""

    name = "clips"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, indices: dict[str, Index], beam: bool = False, **options: Any):
        self._indices, self._beam = indices, beam
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in ("kind", "problem")}
        numbers = dict.fromkeys(("first", "count", "missing"), np.int64)
        bytes_ = tfds.features.Tensor(shape=(), dtype=np.object_)
        class_names = next(iter(self._indices.values())).class_names
        return self.dataset_info_from_configs(
            description="Encoded clips of structvit_jax.",
            features=tfds.features.FeaturesDict(
                {
                    **texts,
                    **numbers,
                    "label": tfds.features.ClassLabel(names=class_names),
                    "files": tfds.features.Sequence(bytes_),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(index) for name, index in self._indices.items()}

    def _generate_examples(self, index: Index) -> Any:
        if not self._beam:
            return ((number, record(index, number)) for number in range(len(index)))
        import apache_beam as beam

        return beam.Create(range(len(index))) | beam.Map(lambda number: (number, record(index, number)))


def record(index: Index, number: int) -> Record:
    """One example, encoded."""
    made: Record = {"label": 0, "kind": "video", "problem": "", "files": []}
    made |= {"first": 0, "count": -1, "missing": 0}
    entry = index.entry(number)
    path = os.path.join(index.root, entry.path)
    try:
        media, made["label"] = index.open(number)
        with contextlib.closing(media):
            if not isinstance(media, VideoFile):
                made["kind"], made["files"] = "pictures", list(_encoded(path))
            elif entry.start is None and entry.end is None:
                made["files"] = [_read(path)]
            else:
                file, made["first"] = media.cut()
                made |= {"files": [file], "count": media.count, "missing": media.missing}
    except (DecodeError, OSError) as error:
        made["problem"] = str(error)
    return made


def _encoded(path: str) -> Iterator[bytes]:
    names = frame_names(os.listdir(path)) if os.path.isdir(path) else [""]
    return (_read(os.path.join(path, name) if name else path) for name in names)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write_shards(
    indices: dict[str, Index], out: str, *, shards: int = 0, runner: str = "", options: Iterable[str] = ()
) -> None:
    """Writes one split per index below `out`.

    Args:
      indices: the splits by name.
      out: a folder, or a bucket's address.
      shards: how many files per split; 0 lets TFDS choose.
      runner: of Apache Beam; "" works in this process.
      options: of Beam's pipeline, "key=value".

    Raises:
      UserError: `out` holds shards already, or Beam is not installed.
    """
    if (epath.Path(out) / Clips.name / "1.0.0").exists():
        raise UserError(f"{out} holds shards already; remove them or choose another folder")
    config: dict[str, Any] = {"num_shards": shards or None}
    if runner:
        try:
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise UserError(
                'Apache Beam is not installed: pip install -c requirements.lock -e ".[beam]"'
            ) from error
        config |= {"beam_runner": runner, "beam_options": PipelineOptions([f"--{o}" for o in options])}
    local = tempfile.mkdtemp(prefix="structvit_jax_shards_") if "://" in out else out
    try:
        builder = Clips(indices=indices, beam=bool(runner), data_dir=local, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**config))
        for split, index in indices.items():
            ids = "".join(index.id(number) + "\n" for number in range(len(index)))
            (epath.Path(builder.data_path) / _ids_file(split)).write_text(ids)
        if local != out:
            copy_tree(epath.Path(local) / Clips.name, epath.Path(out) / Clips.name)
    finally:
        if local != out:
            shutil.rmtree(local, ignore_errors=True)


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder to where Beam cannot write ArrayRecord itself."""
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            item.copy(target / item.name)
