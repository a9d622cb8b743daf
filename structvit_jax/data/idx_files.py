"""Images in IDX files, as MNIST, Fashion-MNIST, KMNIST and EMNIST are distributed.

A split NAME is two files, NAME-images-idx3-ubyte and NAME-labels-idx1-ubyte, plain or compressed (.gz).
Usually NAME is "train" for the training split and "t10k" for the test split. EMNIST has several data sets in
one folder, with splits such as "emnist-balanced-train" and "emnist-balanced-test"; its images are stored
transposed.

The test split "tune" is a random twelfth of the training images, which the training split then lacks.

The classes are the names in labels.txt, if there is one; for EMNIST, the characters in the file
NAME-mapping.txt; for Fashion-MNIST, the published names; otherwise the numbers from 0 to the largest label.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from structvit_jax.data.folder import Layout
from structvit_jax.data.index import LABELS, read_labels
from structvit_jax.data.limits import Limits, file_size
from structvit_jax.data.media import InMemoryFrames
from structvit_jax.utils.errors import UserError, check_choice
from structvit_jax.utils.failures import DecodeError

_FILE = re.compile(r"(.+)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
_UINT8 = b"\0\0\x08"  # beginning of a file whose values are bytes
_MOST_COMPRESSED = 1032  # largest ratio that gzip reaches
_TUNE = "tune"
_TUNE_FRACTION = 1 / 12  # 5,000 of 60,000 images
_SHOWN = 16  # digits of a digest in messages
# Names of the classes, by SHA-256 of the decompressed training labels.
_CLASSES = {
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip


class IdxArrays(NamedTuple):
    """The content of the two files of a split."""

    images: np.ndarray  # uint8 [examples, height, width], grey
    labels: np.ndarray  # uint8 [examples]
    digests: tuple[str, str]  # SHA-256 of the decompressed files of images and of labels, hexadecimal

    @property
    def digests_text(self) -> str:
        """The beginnings of the digests, for messages and fingerprints."""
        images, labels = (digest[:_SHOWN] for digest in self.digests)
        return f"SHA-256 of images {images}, of labels {labels} (decompressed)"


class IdxImages:
    """The images of one split, or some of them.

    Args:
      name: name of the split in the names of its files.
      arrays: the content of the files.
      classes: the classes, as label and name, in order.
      numbers: int [examples], the images to use; None for all.

    Attributes:
      class_names: the classes.
      labels: int32 [examples], positions in `class_names`.
      notes: one line with the digests of the files, for a survey.
      made_from: identifies the images in a fingerprint.
    """

    def __init__(
        self,
        name: str,
        arrays: IdxArrays,
        classes: Sequence[tuple[int, str]],
        numbers: np.ndarray | None = None,
    ):
        self._name, self._numbers = name, np.arange(len(arrays.labels))
        self._images, labels = arrays.images, arrays.labels
        self.notes = (f"{name}: {arrays.digests_text}",)
        self.made_from = f"IDX files {name}, {arrays.digests_text}"
        if numbers is not None:
            self._numbers, self._images, labels = numbers, self._images[numbers], labels[numbers]
            digest = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
            self.made_from += f", numbers {digest[:_SHOWN]}"
        self.class_names = tuple(text for _, text in classes)
        self.labels = np.searchsorted([label for label, _ in classes], labels).astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def id(self, index: int) -> str:
        return f"{self._name}/{self._numbers[index]}"

    def open(self, index: int) -> tuple[InMemoryFrames, int]:
        pixels = np.repeat(self._images[index, ..., None], 3, axis=-1)
        return InMemoryFrames(pixels[None]), int(self.labels[index])


def is_idx(root: str) -> bool:
    """Return whether a folder holds IDX files."""
    return bool(_split_names(root))


def read_splits(layout: Layout) -> tuple[IdxImages, IdxImages]:
    """Read the training and the test split of a folder of IDX files, see `find_splits`.

    Raises:
      UserError: a file is missing, damaged or not understood, or there are several data sets.
    """
    train_name, test_name = find_splits(layout)
    arrays = read_split(layout.root, train_name, layout.limits)
    classes = _classes(layout.root, train_name, arrays)
    if not test_name:
        count, fraction = len(arrays.labels), _TUNE_FRACTION if layout.test == _TUNE else layout.val_fraction
        held = np.random.default_rng(0).permutation(count)[: max(round(count * fraction), 1)]
        parts = np.setdiff1d(np.arange(count), held), np.sort(held)
        left, out = (IdxImages(train_name, arrays, classes, part) for part in parts)
        return left, out
    test = read_split(layout.root, test_name, layout.limits)
    for label in set(test.labels.tolist()).difference(label for label, _ in classes):
        raise UserError(f"{layout.join(test_name)}: label {label} is not a class of {train_name}")
    return IdxImages(train_name, arrays, classes), IdxImages(test_name, test, classes)


def find_splits(layout: Layout) -> tuple[str, str]:
    """Return the names of the training and the test split of a folder of IDX files.

    In `layout`, "train" stands for the only training split, and "val" or "test" for its test split.

    Returns:
      The names. That of the test split is "" if training images are to be held out for it: if `layout.test`
      is "tune", or if there is no test split and `layout.val_fraction` is positive.

    Raises:
      UserError: there is no such split, or there are several data sets.
    """
    names = _split_names(layout.root)
    train, option = layout.train, f"{layout.option}train_split"
    if train == "train" and train not in names:
        found = [name for name in names if name.endswith("-train")]
        if len(found) > 1:
            raise UserError(f"{layout.root} has several data sets; choose one: {option}={' or '.join(found)}")
        train = found[0] if found else train
    check_choice(f"split of the IDX files in {layout.root} ({option})", train, names)
    if layout.test == _TUNE:
        return train, ""
    base = train.removesuffix("train")
    candidates = [base + "t10k", base + "test"] if layout.test in ("val", "test") else [layout.test]
    test = next((name for name in candidates if name in names), "")
    if not test and not layout.val_fraction:
        check_choice(
            f"split of the IDX files in {layout.root} ({layout.option}test_split)", candidates[0], names
        )
    return train, test


def _split_names(root: str) -> list[str]:
    """Return the names of the splits whose files of images are in a folder, sorted.

    There are none in a folder that cannot be read; `structvit_jax.data.folder` reports it.
    """
    try:
        matches = [_FILE.fullmatch(name) for name in os.listdir(root)]
    except OSError:
        return []
    return sorted({match[1] for match in matches if match and match[2] == "images"})


def read_split(root: str, name: str, limits: Limits = Limits()) -> IdxArrays:  # noqa: B008 - immutable
    """Read the two files of a split.

    Raises:
      UserError: a file is missing or damaged, is not an IDX file of bytes, or does not fit the other one.
    """
    (images, image_digest), (labels, label_digest) = (
        _read(_path(root, name, kind), axes, limits) for kind, axes in (("images", 3), ("labels", 1))
    )
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{os.path.join(root, name)}: {len(images):,} images with {len(labels):,} labels")
    if name.startswith("emnist"):
        images = np.ascontiguousarray(images.swapaxes(1, 2))
    return IdxArrays(images, labels, (image_digest, label_digest))


def _path(root: str, name: str, kind: str) -> str:
    """Return the path of the images or labels of a split, preferably that of a file without compression."""
    for file in sorted(os.listdir(root), key=len):
        match = _FILE.fullmatch(file)
        if match and match.groups() == (name, kind):
            return os.path.join(root, file)
    raise UserError(
        f"{root} has {name}-images-idx3-ubyte, but not the file of labels, {name}-labels-idx1-ubyte"
    )


def _read(path: str, axes: int, limits: Limits) -> tuple[np.ndarray, str]:
    """Return the array in an IDX file, and the SHA-256 of the decompressed file."""
    is_compressed = path.endswith(".gz")
    try:
        stored = file_size(path)
        with gzip.open(path) if is_compressed else open(path, "rb") as file:
            header = file.read(4 + 4 * axes)
            if header[:4] != _UINT8 + bytes([axes]) or len(header) < 4 + 4 * axes:
                raise DecodeError(f"not an IDX file of bytes with {axes} {'axes' if axes > 1 else 'axis'}")
            shape = np.frombuffer(header, ">u4", offset=4).tolist()
            if axes == 3:
                limits.check_picture(*shape[1:])
            size = int(np.prod(shape, dtype=object))
            if size > stored * (_MOST_COMPRESSED if is_compressed else 1):
                raise DecodeError(f"cut off: it should have {size:,} values")
            content = file.read(size + 1)
    except (DecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; download it again") from error
    if len(content) != size:
        problem = "cut off: it has" if len(content) < size else "it has more than"
        raise UserError(
            f"{path}: {problem} {min(len(content), size):,} of {size:,} values; download it again"
        )
    digest = hashlib.sha256(header + content).hexdigest()
    return np.frombuffer(content, np.uint8).reshape(shape), digest


def _classes(root: str, name: str, train: IdxArrays) -> list[tuple[int, str]]:
    """Return the classes as label and name, in the order of the labels."""
    count = int(train.labels.max()) + 1
    if names := read_labels(root) or _CLASSES.get(train.digests[1], ()):
        if len(names) < count:
            path = os.path.join(root, LABELS)
            raise UserError(f"{path} has {len(names)} names, but the labels go up to {count - 1}")
        return list(enumerate(names))
    mapping = os.path.join(root, f"{name.removesuffix('train')}mapping.txt")
    if not os.path.isfile(mapping):
        return [(label, str(label)) for label in range(count)]
    try:  # lines of the label and the code of one character, or of both cases of a letter
        with open(mapping, encoding="ascii") as file:
            rows = sorted([int(number) for number in line.split()] for line in file if line.strip())
        classes = [(label, "".join(map(chr, (code, *more)))) for label, code, *more in rows]
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{mapping} is not a list of labels and codes of characters: {error}") from error
    for label in set(train.labels.tolist()).difference(label for label, _ in classes):
        raise UserError(f"{mapping} lacks the label {label}")
    return classes
