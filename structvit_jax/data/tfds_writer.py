"""Write ArrayRecord shards of encoded clips or images. This needs TFDS but not tensorflow."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from structvit_jax.data.folder import Layout, is_video, read_splits
from structvit_jax.data.index import Index
from structvit_jax.data.tfds_reader import FEATURES_FILE, ids_file
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError
from structvit_jax.utils.paths import check_local, write_errors_as_user_error


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

    Shards are written into a temporary folder, which is renamed when they are complete. If the process is
    killed, the same call starts from the beginning.

    Args:
      root: a folder with a layout that `structvit_jax.data.folder` describes.
      out: the folder to write to; config.data.root for training.
      train_split, test_split, val_fraction: as in the section `data` of a configuration.
      images: treat the files as images; False: the kind of most files decides.
      shards: number of files per split; 0: TFDS chooses.
      beam_runner: name of a runner of Apache Beam, such as "DirectRunner"; "" writes in this process.
      beam_options: options of Beam's pipeline, each "key=value".

    Raises:
      UserError: the folder is not understood, or the output exists already or cannot be written.
    """
    check_local(out)
    layout = Layout(root, train_split, test_split, val_fraction, option="--")
    splits = read_splits(layout, video=not images and is_video(layout))
    names = (name.strip("./") or "train" for name in (train_split, test_split))
    indices = dict(zip(names, splits, strict=True))
    most = min(map(len, splits))
    if not 0 <= shards <= most:
        raise UserError(
            f"--shards is {shards}; it needs to lie from 0 to {most}, the size of the smallest split"
        )
    config: dict[str, Any] = {"num_shards": shards or None}
    if beam_runner:
        config |= {"beam_runner": _beam_runner(beam_runner), "beam_options": _beam_options(beam_options)}
    target, partial = Path(out, Clips.name, str(Clips.VERSION)), Path(out, "clips.part")
    with write_errors_as_user_error(out):
        if (target / FEATURES_FILE).exists():
            raise UserError(f"{out} holds shards already; remove them or choose another folder")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        try:
            partial.mkdir(parents=True, exist_ok=True)
            made = _build(
                indices, str(partial), tfds.download.DownloadConfig(**config), beam=bool(beam_runner)
            )
            target.parent.mkdir(exist_ok=True)
            made.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {', '.join(f'{len(index)} {name}' for name, index in indices.items())} examples")


def _build(
    indices: Mapping[str, Index], folder: str, config: tfds.download.DownloadConfig, *, beam: bool
) -> Path:
    """Write one split per index, with its list of ids, and return their folder, which is below `folder`."""
    tempfile.tempdir = folder  # TFDS leaves its temporary folders behind
    try:
        builder = Clips(indices=indices, beam=beam, data_dir=folder, file_format="array_record")
        builder.download_and_prepare(download_config=config)
    except RuntimeError as error:
        if "write() failed" not in str(error):  # the only sign of a full disk
            raise
        raise UserError(f"{folder} cannot be written: {' '.join(str(error).split())[:300]}") from error
    finally:
        tempfile.tempdir = None
    made = Path(builder.data_path)
    for split, index in indices.items():
        (made / ids_file(split)).write_text("".join(f"{name}\n" for name in index.ids()))
    return made


class Clips(tfds.core.GeneratorBasedBuilder):
    """Writes encoded clips or images in the order of an index; the keys are positions in it."""

    name = "clips"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, indices: Mapping[str, Index], beam: bool = False, **options: Any):
        self._indices, self._beam = indices, beam
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        bytes_ = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = {
            "kind": tfds.features.Text(),  # "video" or "pictures"
            "problem": tfds.features.Text(),  # the reason why the example cannot be read, or ""
            "first": np.int64,  # for a part of a file: number of its first frame in the stored file
            "count": np.int64,  # number of frames of a part; -1 for a whole file
            "missing": np.int64,  # number of frames at the end of a part that the file lacks
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
    """Return the record of one example; if it is unreadable, "problem" is the reason."""
    made: dict[str, Any] = {"label": 0, "kind": "video", "problem": "", "files": []}
    made |= {"first": 0, "count": -1, "missing": 0}
    try:
        media, made["label"] = index.open(number)
        with contextlib.closing(media):
            if isinstance(media, VideoFile) and index.entry(number).is_part:
                file, made["first"] = media.cut()
                made |= {"files": [file], "count": media.count, "missing": media.missing}
            else:
                made["kind"] = "video" if isinstance(media, VideoFile) else "pictures"
                made["files"] = [_read(path) for path in index.files(number)]
    except (DecodeError, OSError) as error:
        made["problem"] = str(error)
    return made


def _read(path: str) -> bytes:
    if not os.path.isfile(path):
        raise DecodeError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def _beam_runner(name: str) -> str:
    """Check the name of one of Beam's own runners; for any other name Beam would import a module."""
    try:
        from apache_beam.runners.runner import create_runner

        if not name.isalpha():
            raise ValueError
        create_runner(name)
    except ImportError as error:
        raise UserError("Apache Beam is not installed: pip install 'structvit_jax[beam]'") from error
    except ValueError as error:
        raise UserError(
            f"Apache Beam has no runner {name!r}; choose DirectRunner or another of Beam's own runners"
        ) from error
    return name


def _beam_options(options: Sequence[str]) -> Any:
    from apache_beam.options.pipeline_options import PipelineOptions

    return PipelineOptions([f"--{option}" for option in options])
