"""Examples in ArrayRecord files, written and read through TFDS without tensorflow: shards, and image sets."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from structvit_jax.data.index import Index
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import Media, Part, Pictures, frame_names
from structvit_jax.data.video import VideoFile
from structvit_jax.errors import DecodeError, UserError, decoding

# Features that shards and image sets consist of. TFDS imports the module of any other that a file names.
_FEATURES = frozenset(
    f"{feature.__module__}.{feature.__name__}"
    for feature in (
        tfds.features.BBoxFeature,
        tfds.features.ClassLabel,
        tfds.features.FeaturesDict,
        tfds.features.Image,
        tfds.features.Scalar,
        tfds.features.Sequence,
        tfds.features.Tensor,
        tfds.features.Text,
    )
)
_FEATURES_FILE = "features.json"  # TFDS's description of what a record holds
_FEATURES_FILES = (_FEATURES_FILE, "dataset_info.json")  # that may name feature classes
_NAMING = ("type", "pythonClassName", "python_class_name")  # keys whose text is the name of one


class _Records:
    """One split of a prepared TFDS data set; every process opens its files for itself."""

    def __init__(self, builder: Any, split: str, limits: Limits):
        self._builder_dir, self._split, self._limits = os.fspath(builder.data_path), split, limits
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
    """What `write_shards` wrote, in the order of the index that it was made from.

    Raises:
      UserError: the list of ids is missing or incomplete.
    """

    def __init__(self, builder: Any, split: str, limits: Limits):
        super().__init__(builder, split, limits)
        path = os.path.join(self._builder_dir, _ids_file(split))
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
        with decoding():  # a damaged record raises RuntimeError
            record = self._records[index]
            if problem := record["problem"].decode():
                raise DecodeError(problem)
            if not 0 <= record["label"] < len(self.class_names):
                raise DecodeError(f"label {record['label']} of {len(self.class_names)} classes")
            files = list(record["files"])
            if record["kind"] != b"video":
                return Pictures(files, self._limits), int(record["label"])
            media = VideoFile(files[0], limits=self._limits)
            if record["count"] < 0:
                return media, int(record["label"])
            first, count, missing = (int(record[key]) for key in ("first", "count", "missing"))
            if not (first >= 0 and 0 <= missing <= count and first + count - missing <= media.count):
                media.close()
                raise DecodeError(f"frames {first} to {first + count - missing} of {media.count}")
            self._limits.check_frames(count)
            return Part(media, first, count, missing), int(record["label"])


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
        with decoding():  # a damaged record raises RuntimeError
            record = self._records[index]
            if record["label"] < 0:
                raise DecodeError("has no label")
            return Pictures([record["image"]], self._limits), int(record["label"])


def find_shards(root: str) -> str | None:
    """The folder below `root` (or itself) that holds our shards."""
    folders = [os.path.join(root, "clips", "1.0.0"), root]
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, _FEATURES_FILE))), None)


def open_shards(folder: str, train: str, test: str, limits: Limits) -> tuple[Shards, Shards]:
    """Open the two splits of a folder of shards.

    Raises:
      UserError: no shards, or damaged ones.
    """
    _check_features(folder)
    try:
        with decoding():
            builder = tfds.builder_from_directory(folder)
    except DecodeError as error:
        raise UserError(f"{folder} holds no shards that can be read: {error}") from error
    return Shards(builder, train, limits), Shards(builder, test, limits)


def _check_features(folder: str) -> None:
    """Check the classes that a data set's description names, before TFDS imports their modules.

    Raises:
      UserError: one that is not in `_FEATURES`, or a file that is no JSON.
    """
    for path in (os.path.join(folder, name) for name in _FEATURES_FILES):
        try:
            with open(path, encoding="utf-8") as file:
                names = set(_named_classes(json.load(file)))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
        if foreign := sorted(names - _FEATURES):
            raise UserError(
                f"{path} names {foreign[0][:80]!r}, which is no feature of shards or image sets; write the"
                " shards again with structvit_jax.data.shards"
            )


def _named_classes(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (
            text
            for key in _NAMING
            if isinstance(text := value.get(key), str) and ("." in text or key != "type")
        )
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _named_classes(item)


def open_images(name: str, root: str, train: str, test: str, limits: Limits) -> tuple[Images, Images]:
    """Open the two splits of a TFDS data set, such as "imagenet2012" or "imagenette/160px-v2".

    Args:
      name: of the data set, with its configuration if it has several.
      root: TFDS's data_dir; "" is ~/tensorflow_datasets.
      train, test: names of its splits.
      limits: on the images.

    Raises:
      UserError: an unknown data set, or one that is not prepared as ArrayRecord, or has no images and labels.
    """
    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name):
        raise UserError(f"tfds:{name} is not NAME, NAME/CONFIG or NAME/CONFIG:VERSION of a data set of TFDS")
    where = root or os.path.join("~", "tensorflow_datasets")
    prepare = f"tfds build {name} --file_format=array_record" + (f" --data_dir={root}" if root else "")
    top = os.path.join(os.path.expanduser(where), re.split("[:/]", name)[0])
    for folder, _, files in os.walk(top):
        if not set(files).isdisjoint(_FEATURES_FILES):
            _check_features(folder)
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
    return Images(builder, train, limits), Images(builder, test, limits)


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
    if not os.path.isfile(path):
        raise DecodeError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def write_shards(
    indices: dict[str, Index], out: str, *, shards: int = 0, runner: str = "", options: Iterable[str] = ()
) -> None:
    """Write one split per index below `out`.

    They are written into a folder beside their place, which gets its name when it is complete. After a kill
    the same call starts again.

    Args:
      indices: the splits by name.
      out: a folder, or a bucket's address.
      shards: how many files per split; 0 lets TFDS choose.
      runner: of Apache Beam; "" works in this process.
      options: of Beam's pipeline, "key=value".

    Raises:
      UserError: `out` holds shards already, or Beam is not installed.
    """
    place = epath.Path(out) / Clips.name / "1.0.0"
    if (place / _FEATURES_FILE).exists():
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
    in_bucket = "://" in out
    partial = (
        tempfile.mkdtemp(prefix="structvit_jax_shards_") if in_bucket else os.path.join(out, "clips.part")
    )
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    try:
        builder = Clips(indices=indices, beam=bool(runner), data_dir=partial, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**config))
        for split, index in indices.items():
            ids = "".join(index.id(number) + "\n" for number in range(len(index)))
            (epath.Path(builder.data_path) / _ids_file(split)).write_text(ids)
        if in_bucket:
            copy_tree(epath.Path(builder.data_path), place)
        else:
            place.parent.mkdir(exist_ok=True)
            epath.Path(builder.data_path).rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copy a folder to where Beam cannot write ArrayRecord itself, the file that identifies it last."""
    target.mkdir(parents=True, exist_ok=True)
    for item in sorted(source.iterdir(), key=lambda item: item.name == _FEATURES_FILE):
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            item.copy(target / item.name)
