"""Label maps for token labelling: a teacher's most probable classes at each position of an image.

A folder of label maps holds three files. `classes.npy` is uint16 [images, height, width, k], with one map per
training image. `scores.npy` has the probabilities of these k classes, float16 of the same shape. `maps.json`
has the metadata; its name is `unfinished.json` until all maps are written. A map covers the whole image.
Scores of unreadable images are NaN.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, parse_json
from structvit_jax.utils.paths import check_local

_METADATA, _UNFINISHED = "maps.json", "unfinished.json"
_ARRAYS = {"classes": np.uint16, "scores": np.float16}


class LabelMaps:
    """The maps in a folder, read from disk on demand.

    Args:
      folder: the folder of the maps.
      ids: ids of the training images, in order.
      class_names: classes of the data.

    Raises:
      UserError: there are no maps, or they are unfinished or damaged, or are of other images or classes.
    """

    def __init__(self, folder: str, ids: Sequence[str], class_names: Sequence[str]):
        path = os.path.join(folder, _METADATA)
        metadata = _read_metadata(path)
        if not metadata:
            raise UserError(
                f"config.data.label_maps: no finished label maps in {folder};"
                " structvit prepare label_maps TEACHER FOLDER writes them, and resumes after a stop"
            )
        if metadata.get("ids") != digest(ids):
            raise UserError(
                f"{path} has maps of {metadata.get('images')} images that are not the {len(ids)} of the"
                " training split"
            )
        names = metadata.get("class_names")
        if not isinstance(names, list) or sorted(map(str, names)) != sorted(class_names):
            raise UserError(f"{path}: the teacher's classes are not those of the data")
        number = {name: number for number, name in enumerate(class_names)}
        self._number = np.array([number[str(name)] for name in names], np.uint16)
        self._classes, self._scores = (_open(folder, name, len(ids)) for name in _ARRAYS)
        if self._classes.shape != self._scores.shape:
            raise UserError(f"{folder}: classes.npy and scores.npy have different shapes; write them again")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, and number of classes at each position."""
        return self._scores.shape[1:]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image's classes, numbered as those of the data, and their probabilities.

        Raises:
          DecodeError: the map has a class number without a name.
        """
        classes = self._classes[index]
        if classes.max(initial=0) >= len(self._number):
            raise DecodeError("its label map is damaged")
        return self._number[classes], np.array(self._scores[index])


def _read_metadata(path: str) -> dict[str, Any]:
    """Return the metadata of maps, or {} if the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            metadata = parse_json(file.read())
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _open(folder: str, name: str, images: int) -> np.ndarray:
    """Open an array of finished maps, memory-mapped; raise UserError if it is missing or damaged."""
    path = os.path.join(folder, f"{name}.npy")
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); write the label maps again") from error
    if array.ndim != 4 or len(array) != images or array.dtype != _ARRAYS[name]:
        raise UserError(f"{path} is {array.dtype} {array.shape}; write the label maps again")
    return array


def check_destination(folder: str) -> None:
    """Check that a folder is new, empty, or holds unfinished label maps.

    Raises:
      UserError: it holds other files or finished maps, is itself a file, or is in a bucket.
    """
    check_local(folder)
    if not os.path.exists(folder):
        return
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is a file; choose a folder for the label maps")
    names = os.listdir(folder)
    if _METADATA in names:
        raise UserError(f"{folder} holds finished label maps; choose another folder")
    if names and _UNFINISHED not in names:
        raise UserError(f"{folder} holds other files; choose a new folder for the label maps")


class LabelMapWriter:
    """Writes maps in the order of the images, and resumes unfinished ones.

    Args:
      folder: a new or empty folder, or unfinished maps.
      metadata: describes the maps; all entries except "teacher", a path, identify them.
      shape: [images, height, width, k].

    Raises:
      UserError: the folder holds finished maps, unfinished maps with other metadata, or other files.
    """

    def __init__(self, folder: str, metadata: dict[str, Any], shape: tuple[int, int, int, int]):
        check_destination(folder)
        self._folder = folder
        metadata = json.loads(json.dumps({**metadata, "shape": shape}))  # tuples become lists, as in the file
        path = os.path.join(folder, _UNFINISHED)
        if os.path.exists(path):
            found = _read_metadata(path)
            if differing := [key for key in metadata if key != "teacher" and found.get(key) != metadata[key]]:
                raise UserError(
                    f"{folder} holds unfinished label maps of {found.get('teacher', 'an unknown teacher')}"
                    f" with other {', '.join(differing)}; remove them or choose another folder"
                )
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(metadata, file, indent=2)
        os.replace(f"{path}.part", path)
        self._classes, self._scores = (
            _create(os.path.join(folder, f"{name}.npy"), dtype, shape) for name, dtype in _ARRAYS.items()
        )

    @property
    def done(self) -> int:
        """Number of images whose maps are written; these are the first ones."""
        empty = ~np.any(self._scores[..., 0] != 0, axis=(1, 2))
        return int(np.argmax(empty)) if empty.any() else len(empty)

    def write(self, start: int, classes: np.ndarray, scores: np.ndarray) -> None:
        """Write the maps of images from `start` on; scores of unreadable images are NaN."""
        self._classes[start : start + len(classes)] = classes
        self._scores[start : start + len(scores)] = scores

    def finish(self) -> None:
        """Mark the maps as finished."""
        self._classes.flush()
        self._scores.flush()
        os.replace(os.path.join(self._folder, _UNFINISHED), os.path.join(self._folder, _METADATA))


def _create(path: str, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """Open an array on disk for writing; if it does not exist, create it atomically."""
    if not os.path.exists(path):
        np.lib.format.open_memmap(f"{path}.part", "w+", dtype=dtype, shape=shape)
        os.replace(f"{path}.part", path)
    return np.lib.format.open_memmap(path, "r+")


def digest(ids: Sequence[str]) -> str:
    """Return a digest of the ids of examples."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
