"""Find and open the files and folders that a trained model is applied to. They have no labels."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence

from structvit_jax.data.folder import examples_below
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import Entry
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import open_media
from structvit_jax.data.types import Media, Source
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

TEST = "test:"  # test:N is example N of the test split


class Files:
    """A source of examples without labels: every label is 0.

    Args:
      entries: the examples, see `find`.
      class_names: classes of the model.
      video: whether the model takes videos rather than images.
      other: name of a model that takes images instead of videos or vice versa, for messages.
      test: function that returns the test split, for entries test:N.
      limits: limits on the files.
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
        """Return the class of an example, or "" if it is unknown.

        The class of test:N is its label. The class of a file is the nearest folder above it that has the name
        of a class.

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
        """Return the frames of an example, and 0 as its label.

        Raises:
          DecodeError: the example cannot be read, or is an image although the model takes videos, or vice
            versa.
        """
        entry = self._entries[index]
        if entry.path.startswith(TEST):
            source, number = self._test_example(entry.path)
            return source.open(number)[0], 0
        if not os.path.exists(entry.path):
            raise DecodeError("no such file")
        is_image = entry.path.lower().endswith(IMAGES)
        if self._video and is_image:
            takes = f"videos, or folders of frames (a model such as {self._other} takes images)"
            raise DecodeError(f"an image; this model takes {takes}")
        if not self._video and not is_image:
            takes = f"images (a model such as {self._other} takes videos)"
            raise DecodeError(f"not an image ({', '.join(IMAGES)}); this model takes {takes}")
        return open_media(entry.path, entry.start, entry.end, self._limits), 0

    def _test_example(self, path: str) -> tuple[Source, int]:
        source, number = self._test(), path.removeprefix(TEST)
        if not number.isdecimal() or len(number) > 18 or int(number) >= len(source):
            raise DecodeError(f"the test examples are {TEST}0 to {TEST}{len(source) - 1}")
        return source, int(number)


def find(paths: Sequence[str], *, video: bool, other: str, every: float = 0, limits: Limits) -> list[Entry]:
    """Return the examples at some paths, in order: files, and all videos (or images) in folders.

    Args:
      paths: files, folders, and test:N. For videos, a folder of images is one clip.
      video: whether examples are videos rather than images.
      other: name of a model that takes images instead of videos or vice versa, for messages.
      every: cut longer videos into parts of about this many seconds, one example each; 0 cuts none. The last
        part takes the rest, from half to one and a half times as long.
      limits: limits on the files.

    Raises:
      UserError: a folder has no videos (or images), or parts would be shorter than a frame.
    """
    if not 0 <= every < math.inf:
        raise UserError(
            f"--every={every} is not a number of seconds; write --every=10, or --every=0 for whole files"
        )
    entries = [entry for path in paths for entry in _below(path, video, other)]
    if not (video and every):
        return entries
    return [part for entry in entries for part in _parts(entry, every, limits)]


def _below(path: str, video: bool, other: str) -> list[Entry]:
    if not os.path.isdir(path):
        return [Entry(path, "")]
    found = [Entry(os.path.normpath(os.path.join(path, name)), "") for name in examples_below(path, video)]
    if not found:
        kind, rest = ("videos", "images") if video else ("images", "videos")
        raise UserError(
            f"{path}: there are no {kind} in this folder, and the model takes {kind} (a model such as {other}"
            f" takes {rest})"
        )
    return found


def _parts(entry: Entry, every: float, limits: Limits) -> Iterator[Entry]:
    """Yield the parts of a video, or the entry itself if it is short or unreadable; `open` reports that."""
    seconds, frames = 0.0, 0
    with contextlib.suppress(DecodeError):
        if os.path.isfile(entry.path) and not entry.path.lower().endswith(IMAGES):
            with contextlib.closing(VideoFile(entry.path, limits=limits)) as media:
                seconds, frames = media.seconds, media.count
    if seconds > frames * every:
        raise UserError(
            f"--every={every:g}: {entry.id} has {frames} frames in {seconds:.6g} s, so parts need at least"
            f" {seconds / frames:.3g} s"
        )
    count = max(1, round(seconds / every))
    if count == 1:
        yield entry
        return
    for number in range(count):
        end = (number + 1) * every if number < count - 1 else None
        yield entry._replace(start=number * every, end=end)
