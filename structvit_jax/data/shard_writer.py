"""Write ArrayRecord shards of encoded clips or images, through TFDS without tensorflow."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from structvit_jax.data.index import Index
from structvit_jax.data.media import frame_names
from structvit_jax.data.records import FEATURES_FILE, ids_file
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import DecodeError, UserError
from structvit_jax.utils.paths import is_bucket, parse_path

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
      UserError: `out` holds shards already, there are fewer examples than files, or Beam is not installed
        or has no such runner.
    """
    least = min(map(len, indices.values()))
    if not 0 <= shards <= least:
        raise UserError(f"--shards is {shards}; it needs to lie from 0 to {least}, the examples of a split")
    place = parse_path(out) / Clips.name / "1.0.0"
    if (place / FEATURES_FILE).exists():
        raise UserError(f"{out} holds shards already; remove them or choose another folder")
    config: dict[str, Any] = {"num_shards": shards or None}
    if runner:
        config |= {"beam_runner": _beam_runner(runner), "beam_options": _beam_options(options)}
    in_bucket = is_bucket(place)
    partial = (
        tempfile.mkdtemp(prefix="structvit_jax_shards_") if in_bucket else os.path.join(out, "clips.part")
    )
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    try:
        os.makedirs(partial, exist_ok=True)
        tempfile.tempdir = partial  # TFDS leaves its temporary folders behind
        builder = Clips(indices=indices, beam=bool(runner), data_dir=partial, file_format="array_record")
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**config))
        except RuntimeError as error:
            if "write() failed" not in str(error):  # as a full disk
                raise
            raise UserError(f"{out} cannot be written: {' '.join(str(error).split())[:300]}") from error
        for split, index in indices.items():
            ids = "".join(index.id(number) + "\n" for number in range(len(index)))
            (epath.Path(builder.data_path) / ids_file(split)).write_text(ids)
        if in_bucket:
            copy_tree(epath.Path(builder.data_path), place)
        else:
            place.parent.mkdir(exist_ok=True)
            epath.Path(builder.data_path).rename(place)
    finally:
        tempfile.tempdir = None
        shutil.rmtree(partial, ignore_errors=True)


def _beam_runner(name: str) -> str:
    """Return the name of one of Beam's own runners; of others it would import the module that they name."""
    try:
        from apache_beam.runners.runner import create_runner

        if not name.isalpha():
            raise ValueError
        create_runner(name)
    except ImportError as error:
        raise UserError(
            'Apache Beam is not installed: pip install -c requirements.lock -e ".[beam]"'
        ) from error
    except ValueError as error:
        raise UserError(
            f"Apache Beam has no runner {name!r}; take DirectRunner or another of its own"
        ) from error
    return name


def _beam_options(options: Iterable[str]) -> Any:
    from apache_beam.options.pipeline_options import PipelineOptions

    return PipelineOptions([f"--{option}" for option in options])


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copy a folder to where Beam cannot write ArrayRecord itself, the file that identifies it last."""
    target.mkdir(parents=True, exist_ok=True)
    for item in sorted(source.iterdir(), key=lambda item: item.name == FEATURES_FILE):
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            item.copy(target / item.name)
