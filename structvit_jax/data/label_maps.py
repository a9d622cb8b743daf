"""Label maps for token labelling: for every training image, a teacher's classes at each position.

A folder holds `classes.npy`, uint16 [images, height, width, k], `scores.npy`, float16 of the same shape, the
probabilities of these k classes, and a card that describes them: `maps.json`, named `unfinished.json` until
all maps are written. A map covers the whole image. Scores of unreadable images are NaN.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from structvit_jax.utils.errors import DecodeError, UserError, parse_json
from structvit_jax.utils.paths import check_local

_CARD, _UNFINISHED = "maps.json", "unfinished.json"
_ARRAYS = {"classes": np.uint16, "scores": np.float16}


class LabelMaps:
    """The maps in a folder, read from disk on demand.

    Raises:
      UserError: there are none, they are unfinished, or they belong to other images or classes.
    """

    def __init__(self, folder: str, ids: Sequence[str], class_names: Sequence[str]):
        path = os.path.join(folder, _CARD)
        self.card = _read_card(path)
        if self.card is None:
            raise UserError(
                f"config.data.label_maps: no finished label maps in {folder};"
                " structvit prepare label_maps TEACHER FOLDER writes them, and resumes after a stop"
            )
        if self.card.get("ids") != digest(ids):
            raise UserError(
                f"{path} has maps of {self.card.get('images')} other images than the {len(ids)} of the"
                " training split"
            )
        names = self.card.get("class_names")
        if not isinstance(names, list) or sorted(map(str, names)) != sorted(class_names):
            raise UserError(f"{path}: the teacher's classes are not those of the data")
        number = {name: number for number, name in enumerate(class_names)}
        self._number = np.array([number[str(name)] for name in names], np.uint16)
        self._classes, self._scores = (_open(folder, name, len(ids)) for name in _ARRAYS)
        if self._classes.shape != self._scores.shape:
            raise UserError(f"{folder}: classes.npy and scores.npy are of different shapes; write them again")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, and number of classes at each position."""
        return self._scores.shape[1:]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image's classes, numbered as those of the data, and their probabilities.

        Raises:
          DecodeError: a class has no name.
        """
        classes = self._classes[index]
        if classes.max(initial=0) >= len(self._number):
            raise DecodeError("its label map is damaged")
        return self._number[classes], np.array(self._scores[index])


def _read_card(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            card = parse_json(file.read())
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def _open(folder: str, name: str, images: int) -> np.ndarray:
    """Return an array of a folder of maps, memory-mapped.

    Raises:
      UserError: it is missing or damaged.
    """
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
      UserError: it holds something else, such as data, or is in a bucket.
    """
    check_local(folder)
    if not os.path.exists(folder):
        return
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is a file; choose a folder for the label maps")
    names = os.listdir(folder)
    if _CARD in names:
        raise UserError(f"{folder} holds finished label maps; choose another folder")
    if names and _UNFINISHED not in names:
        raise UserError(f"{folder} holds something else than label maps; choose a new folder for them")


class LabelMapWriter:
    """Writes maps in the order of the images, and resumes unfinished ones.

    Args:
      folder: a new or empty folder, or unfinished maps.
      card: identifies the maps, except its "teacher", a path for people to read.
      shape: [images, height, width, k].

    Raises:
      UserError: the folder holds finished maps, unfinished ones of another card, or other files.
    """

    def __init__(self, folder: str, card: dict[str, Any], shape: tuple[int, int, int, int]):
        check_destination(folder)
        self._folder, self._arrays = folder, {}
        self._card = json.loads(json.dumps({**card, "shape": shape}))  # as read back
        path = os.path.join(folder, _UNFINISHED)
        if os.path.exists(path):
            self._check_same(_read_card(path) or {})
        os.makedirs(folder, exist_ok=True)
        _write_card(path, self._card)
        for name, dtype in _ARRAYS.items():
            path = os.path.join(folder, f"{name}.npy")
            if not os.path.exists(path):
                np.lib.format.open_memmap(f"{path}.part", "w+", dtype=dtype, shape=shape)
                os.replace(f"{path}.part", path)
            self._arrays[name] = np.lib.format.open_memmap(path, "r+")

    def _check_same(self, unfinished: dict[str, Any]) -> None:
        differing = [key for key in self._card if key != "teacher" and unfinished.get(key) != self._card[key]]
        if differing:
            raise UserError(
                f"{self._folder} holds unfinished label maps of"
                f" {unfinished.get('teacher', 'an unknown teacher')} with other {', '.join(differing)};"
                " remove them or choose another folder"
            )

    @property
    def done(self) -> int:
        """Number of images whose maps are written."""
        empty = ~np.any(self._arrays["scores"][..., 0] != 0, axis=(1, 2))
        return int(np.argmax(empty)) if empty.any() else len(empty)

    def write(self, start: int, classes: np.ndarray, scores: np.ndarray) -> None:
        """Write the maps of images from `start` on; scores of unreadable images are NaN."""
        self._arrays["classes"][start : start + len(classes)] = classes
        self._arrays["scores"][start : start + len(scores)] = scores

    def finish(self) -> None:
        """Mark the maps as finished."""
        for array in self._arrays.values():
            array.flush()
        os.replace(os.path.join(self._folder, _UNFINISHED), os.path.join(self._folder, _CARD))


def _write_card(path: str, card: dict[str, Any]) -> None:
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(card, file, indent=2)
    os.replace(f"{path}.part", path)


def digest(ids: Sequence[str]) -> str:
    """Return a digest of the ids of examples."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
