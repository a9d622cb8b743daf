"""Files and folders, in the order given, as examples without labels for a trained model."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence

from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import Entry, examples_below
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import open_media
from structvit_jax.data.types import Media, Source
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import DecodeError, UserError

TEST = "test:"  # test:N is example N of a test split


class Files:
    """A source of examples without labels; each is given label 0.

    Args:
      entries: see `find`.
      class_names: of the model.
      video: whether the model takes videos, or else images.
      other: name of a model that takes the other kind, for messages.
      test: opens the split that entries named test:N belong to.
      limits: on the files.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        class_names: Sequence[str],
        *,
        video: bool,
        other: str,
        test: Callable[[], Source],
        limits: Limits,
    ):
        self._entries, self._video, self._other = entries, video, other
        self._test, self._limits = test, limits
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._entries)

    def id(self, index: int) -> str:
        return self._entries[index].id

    def true_class(self, index: int) -> str:
        """Return the class of an example if it is known, otherwise "": of test:N by its split, of a file by
        the nearest folder above it that is named after a class.

        Raises:
          DecodeError: there is no such test example.
        """
        path = self._entries[index].path
        if path.startswith(TEST):
            source, number = self._test_example(path)
            media, label = source.open(number)
            media.close()
            return source.class_names[label]
        folders = reversed(os.path.dirname(os.path.abspath(path)).split(os.sep))
        return next((folder for folder in folders if folder in self.class_names), "")

    def open(self, index: int) -> tuple[Media, int]:
        """Open an example; raise DecodeError if it cannot be read or is not of the kind the model takes."""
        entry = self._entries[index]
        if entry.path.startswith(TEST):
            source, number = self._test_example(entry.path)
            return source.open(number)[0], 0
        if not os.path.exists(entry.path):
            raise DecodeError("no such file")
        if self._video and entry.path.lower().endswith(IMAGES):
            raise DecodeError(
                f"an image; this model takes videos, or folders of frames (a model such as {self._other}"
                " takes images)"
            )
        if not self._video and not entry.path.lower().endswith(IMAGES):
            raise DecodeError(
                f"not an image ({', '.join(IMAGES)}); this model takes images (a model such as {self._other}"
                " takes videos)"
            )
        return open_media(entry.path, entry.start, entry.end, self._limits), 0

    def _test_example(self, path: str) -> tuple[Source, int]:
        source, number = self._test(), path.removeprefix(TEST)
        if not number.isdecimal() or len(number) > 18 or int(number) >= len(source):
            raise DecodeError(f"the test examples are {TEST}0 to {TEST}{len(source) - 1}")
        return source, int(number)


def find(paths: Sequence[str], *, video: bool, other: str, every: float = 0, limits: Limits) -> list[Entry]:
    """Return the examples that paths stand for: a file itself, and everything in a folder.

    Args:
      paths: of files and folders, and test:N. For videos, a folder that holds images is one clip.
      video: whether examples are videos, or else images.
      other: name of a model that takes the other kind, for messages.
      every: seconds; longer videos are cut into parts of this length, one example each. 0 cuts none.
      limits: on the files.

    Raises:
      UserError: a folder in which there is nothing of the kind, or parts that are shorter than a frame.
    """
    if not 0 <= every < math.inf:
        raise UserError(
            f"--every={every} is no number of seconds; write --every=10, or --every=0 for whole files"
        )
    return [
        part
        for path in paths
        for entry in _of(path, video, other)
        for part in _parts(entry, video, every, limits)
    ]


def _of(path: str, video: bool, other: str) -> Iterator[Entry]:
    if not os.path.isdir(path):
        yield Entry(path, "")
        return
    found = [Entry(os.path.normpath(os.path.join(path, name)), "") for name in examples_below(path, video)]
    if not found:
        kind, rest = ("videos", "images") if video else ("images", "videos")
        raise UserError(
            f"{path}: there are no {kind} in this folder, and the model takes {kind} (a model such as {other}"
            f" takes {rest})"
        )
    yield from found


def _parts(entry: Entry, video: bool, every: float, limits: Limits) -> Iterator[Entry]:
    """Yield the parts of an entry; the entry itself if it is short, or cannot be read (reported later)."""
    seconds, frames = _length(entry, limits) if video and every else (0.0, 0)
    if seconds > frames * every:
        raise UserError(
            f"--every={every:g}: {entry.id} has {frames} frames in {seconds:.6g} s, so parts need at least"
            f" {seconds / frames:.3g} s"
        )
    count = max(1, round(seconds / every)) if every else 1
    if count == 1:
        yield entry
        return
    for number in range(count):
        last = number == count - 1
        yield entry._replace(start=number * every, end=None if last else (number + 1) * every)


def _length(entry: Entry, limits: Limits) -> tuple[float, int]:
    """Return the seconds and frames of a video; zeros of anything else."""
    with contextlib.suppress(DecodeError):
        if os.path.isfile(entry.path) and not entry.path.lower().endswith(IMAGES):
            with contextlib.closing(VideoFile(entry.path, limits=limits)) as media:
                return media.seconds, media.count
    return 0.0, 0
