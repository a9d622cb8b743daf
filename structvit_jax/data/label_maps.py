"""Label maps for token labelling: for every training image, the classes that a teacher sees in each part.

A folder holds `classes.npy`, uint16 [images, height, width, k], `scores.npy`, float16 of the same shape, the
probabilities of these k classes, and `maps.json`, which is written last. The map covers the whole image. An
image that could not be read has NaN.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from structvit_jax.errors import UserError

_CARD = "maps.json"
_ARRAYS = {"classes": np.uint16, "scores": np.float16}


class LabelMaps:
    """The maps in a folder, read from disk as they are asked for.

    Raises:
      UserError: there are none, they are not finished, or they are of other images or classes.
    """

    def __init__(self, folder: str, ids: Sequence[str], class_names: Sequence[str]):
        path = os.path.join(folder, _CARD)
        try:
            with open(path, encoding="utf-8") as file:
                self.card = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"config.data.label_maps: no finished label maps in {folder};"
                " python -m structvit_jax.label_maps TEACHER FOLDER writes them, and goes on where it was"
            ) from error
        if self.card["ids"] != digest(ids):
            raise UserError(
                f"{path} is of {self.card['images']} other images than the {len(ids)} of the training split"
            )
        if set(self.card["class_names"]) != set(class_names):
            raise UserError(f"{path}: the teacher's classes are not those of the data")
        number = {name: number for number, name in enumerate(class_names)}
        self._number = np.array([number[name] for name in self.card["class_names"]], np.uint16)
        arrays = (np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r") for name in _ARRAYS)
        self._classes, self._scores = arrays

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, and the number of classes at each place."""
        return self._scores.shape[1:]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image's classes, numbered as the data's, and their probabilities."""
        return self._number[self._classes[index]], np.array(self._scores[index])


class LabelMapWriter:
    """Writes maps in the order of the images; one that was interrupted goes on where it was.

    Raises:
      UserError: the folder holds maps of other images, or finished ones.
    """

    def __init__(self, folder: str, card: dict[str, Any], shape: tuple[int, int, int, int]):
        """`shape` is [images, height, width, k]; `card` says what the maps are of."""
        self._folder, self._card, self._arrays = folder, card, {}
        if os.path.exists(os.path.join(folder, _CARD)):
            raise UserError(f"{folder} holds finished label maps; choose another folder")
        os.makedirs(folder, exist_ok=True)
        for name, dtype in _ARRAYS.items():
            path = os.path.join(folder, f"{name}.npy")
            mode = "r+" if os.path.exists(path) else "w+"
            array = np.lib.format.open_memmap(path, mode, dtype=dtype, shape=shape)
            if array.shape != shape:
                raise UserError(f"{path} is of shape {array.shape}, not {shape}: begun for others; remove it")
            self._arrays[name] = array

    @property
    def done(self) -> int:
        """How many images have their maps."""
        empty = ~np.any(self._arrays["scores"][..., 0] != 0, axis=(1, 2))
        return int(np.argmax(empty)) if empty.any() else len(empty)

    def write(self, start: int, classes: np.ndarray, scores: np.ndarray) -> None:
        """Maps of images from `start` on: those of images that could not be read are NaN."""
        self._arrays["classes"][start : start + len(classes)] = classes
        self._arrays["scores"][start : start + len(scores)] = scores

    def finish(self) -> None:
        """Writes the card, with which the maps count."""
        for array in self._arrays.values():
            array.flush()
        partial = os.path.join(self._folder, f"{_CARD}.part")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(self._card, file, indent=2)
        os.replace(partial, os.path.join(self._folder, _CARD))


def digest(ids: Sequence[str]) -> str:
    """What tells one list of examples from another."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
