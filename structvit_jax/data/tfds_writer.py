"""Write ArrayRecord shards of encoded clips or images for clusters, through TFDS without tensorflow."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from structvit_jax.data.folder import Layout, is_video, read_splits
from structvit_jax.data.index import Index
from structvit_jax.data.media import frame_names
from structvit_jax.data.tfds_reader import FEATURES_FILE, ids_file
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import DecodeError, UserError
from structvit_jax.utils.paths import is_bucket, parse_path, write_errors_as_user_error


def write_folder(
    root: str,
    out: str,
    *,
    train_split: str = "train",
    test_split: str = "val",
    val_fraction: float = 0.0,
    images: bool = False,
    shards: int = 0,
    beam_runner: str = "",
    beam_options: Sequence[str] = (),
) -> None:
    """Write the shards of a folder and print how many examples they hold.

    Args:
      root: a folder as `structvit_jax.data.folder` describes it.
      out: the config.data.root to train from; a folder or a bucket.
      train_split, test_split, val_fraction: of the folder, as in a configuration.
      images: whether files are images; otherwise the kind of most of them.
      shards: files per split; 0 chooses.
      beam_runner: of Apache Beam, as "DirectRunner"; "" writes in this process.
      beam_options: of Beam's pipeline, as "key=value".

    Raises:
      UserError: a folder that is not understood, or an output that cannot be written.
    """
    layout = Layout(root, train_split, test_split, val_fraction, option="--")
    splits = read_splits(layout, video=not images and is_video(layout))
    names = (name.strip("./") or "train" for name in (train_split, test_split))
    indices = dict(zip(names, splits, strict=True))
    least = min(map(len, splits))
    if not 0 <= shards <= least:
        raise UserError(f"--shards is {shards}; it needs to lie from 0 to {least}, the examples of a split")
    config: dict[str, Any] = {"num_shards": shards or None}
    if beam_runner:
        config |= {"beam_runner": _beam_runner(beam_runner), "beam_options": _beam_options(beam_options)}
    with write_errors_as_user_error(out):
        _write(indices, out, tfds.download.DownloadConfig(**config), beam=bool(beam_runner))
    print(f"{out}: {', '.join(f'{len(index)} {name}' for name, index in indices.items())} examples")


class Clips(tfds.core.GeneratorBasedBuilder):
    """Writes encoded clips or images in the order of an index, whose positions are the keys."""

    name = "clips"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, indices: Mapping[str, Index], beam: bool = False, **options: Any):
        self._indices, self._beam = indices, beam
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        bytes_ = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = {
            "kind": tfds.features.Text(),  # "video" or "pictures"
            "problem": tfds.features.Text(),  # why the example cannot be read, or ""
            "first": np.int64,  # of a part: its frames in the file
            "count": np.int64,  # -1 for a whole file
            "missing": np.int64,
            "label": tfds.features.ClassLabel(names=next(iter(self._indices.values())).class_names),
            "files": tfds.features.Sequence(bytes_),
        }
        return self.dataset_info_from_configs(
            description="Encoded clips of structvit_jax.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(index) for name, index in self._indices.items()}

    def _generate_examples(self, index: Index) -> Any:
        if not self._beam:
            return ((number, record(index, number)) for number in range(len(index)))
        import apache_beam as beam

        return beam.Create(range(len(index))) | beam.Map(lambda number: (number, record(index, number)))


def record(index: Index, number: int) -> dict[str, Any]:
    """Return one example, encoded; an unreadable one has the reason as its "problem"."""
    made: dict[str, Any] = {"label": 0, "kind": "video", "problem": "", "files": []}
    made |= {"first": 0, "count": -1, "missing": 0}
    path = index.path(number)
    try:
        media, made["label"] = index.open(number)
        with contextlib.closing(media):
            if not isinstance(media, VideoFile):
                names = frame_names(os.listdir(path)) if os.path.isdir(path) else None
                paths = [path] if names is None else [os.path.join(path, name) for name in names]
                made["kind"], made["files"] = "pictures", [_read(path) for path in paths]
            elif index.entry(number).is_part:
                file, made["first"] = media.cut()
                made |= {"files": [file], "count": media.count, "missing": media.missing}
            else:
                made["files"] = [_read(path)]
    except (DecodeError, OSError) as error:
        made["problem"] = str(error)
    return made


def _read(path: str) -> bytes:
    if not os.path.isfile(path):
        raise DecodeError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def _write(
    indices: Mapping[str, Index], out: str, config: tfds.download.DownloadConfig, *, beam: bool
) -> None:
    """Write one split per index below `out`, a folder or a bucket.

    Shards are written into a temporary folder that is renamed when they are complete. After a kill the same
    call starts again.

    Raises:
      UserError: `out` holds shards already, or is full.
    """
    target = parse_path(out) / Clips.name / "1.0.0"
    if (target / FEATURES_FILE).exists():
        raise UserError(f"{out} holds shards already; remove them or choose another folder")
    in_bucket = is_bucket(target)
    partial = (
        tempfile.mkdtemp(prefix="structvit_jax_shards_") if in_bucket else os.path.join(out, "clips.part")
    )
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    try:
        os.makedirs(partial, exist_ok=True)
        tempfile.tempdir = partial  # TFDS leaves its temporary folders behind
        builder = Clips(indices=indices, beam=beam, data_dir=partial, file_format="array_record")
        try:
            builder.download_and_prepare(download_config=config)
        except RuntimeError as error:
            if "write() failed" not in str(error):  # the only sign of a full disk
                raise
            raise UserError(f"{out} cannot be written: {' '.join(str(error).split())[:300]}") from error
        made = epath.Path(builder.data_path)
        for split, index in indices.items():
            ids = "".join(index.id(number) + "\n" for number in range(len(index)))
            (made / ids_file(split)).write_text(ids)
        if in_bucket:
            copy_tree(made, target)
        else:
            target.parent.mkdir(exist_ok=True)
            made.rename(target)
    finally:
        tempfile.tempdir = None
        shutil.rmtree(partial, ignore_errors=True)


def _beam_runner(name: str) -> str:
    """Return the name of a runner of Beam itself; for any other name Beam would import a module."""
    try:
        from apache_beam.runners.runner import create_runner

        if not name.isalpha():
            raise ValueError
        create_runner(name)
    except ImportError as error:
        raise UserError("Apache Beam is not installed: pip install 'structvit_jax[beam]'") from error
    except ValueError as error:
        raise UserError(
            f"Apache Beam has no runner {name!r}; choose DirectRunner or another of Beam"
        ) from error
    return name


def _beam_options(options: Iterable[str]) -> Any:
    from apache_beam.options.pipeline_options import PipelineOptions

    return PipelineOptions([f"--{option}" for option in options])


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copy a folder, as Beam cannot write ArrayRecord to a bucket; the file that identifies it comes last."""
    target.mkdir(parents=True, exist_ok=True)
    for item in sorted(source.iterdir(), key=lambda item: item.name == FEATURES_FILE):
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            item.copy(target / item.name)
