"""Files and folders, in the order given, whose labels nobody asks for: what a trained model is shown."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from structvit_jax.data.index import Entry, examples_below
from structvit_jax.data.media import IMAGES, Media, open_media
from structvit_jax.data.reader import Source
from structvit_jax.data.video import VideoFile
from structvit_jax.errors import DecodeError, UserError

TEST = "test:"  # test:N is example N of a test split


class Files:
    """A source of examples whose label is 0 for want of a better one.

    Args:
      entries: see `find`.
      class_names: of the model.
      video: whether the model takes videos, or else images.
      test: opens the split that entries called test:N are of.
    """

    def __init__(
        self, entries: Sequence[Entry], class_names: Sequence[str], *, video: bool, test: Callable[[], Source]
    ):
        self._entries, self._video, self._test = entries, video, test
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
        """Raises DecodeError: it cannot be read, or is an image where clips are wanted or the reverse."""
        entry = self._entries[index]
        if entry.path.startswith(TEST):
            source, number = self._test_example(entry.path)
            return source.open(number)[0], 0
        if not os.path.exists(entry.path):
            raise DecodeError("no such file")
        if self._video and entry.path.lower().endswith(IMAGES):
            raise DecodeError("an image; this model takes videos, or folders of frames")
        if not self._video and not entry.path.lower().endswith(IMAGES):
            raise DecodeError(f"not an image ({', '.join(IMAGES)}); this model takes images")
        return open_media(entry.path, entry.start, entry.end), 0

    def _test_example(self, path: str) -> tuple[Source, int]:
        source, number = self._test(), path.removeprefix(TEST)
        if not number.isdecimal() or int(number) >= len(source):
            raise DecodeError(f"the test examples are {TEST}0 to {TEST}{len(source) - 1}")
        return source, int(number)


def find(paths: Sequence[str], *, video: bool, every: float = 0) -> list[Entry]:
    """The examples that paths stand for: a file itself, of a folder all that is in it.

    Args:
      paths: of files and folders, and test:N. For videos, a folder that holds images is one clip.
      video: whether examples are videos, or else images.
      every: seconds; longer videos are cut into parts of this length, an example each. 0 cuts none.

    Raises:
      UserError: a folder in which there is nothing of the kind.
    """
    return [part for path in paths for entry in _of(path, video) for part in _parts(entry, video, every)]


def _of(path: str, video: bool) -> Iterator[Entry]:
    if not os.path.isdir(path):
        yield Entry(path, "")
        return
    found = [Entry(os.path.normpath(os.path.join(path, name)), "") for name in examples_below(path, video)]
    if not found:
        kind = "videos" if video else "images"
        raise UserError(f"{path}: there are no {kind} in this folder, and the model takes {kind}")
    yield from found


def _parts(entry: Entry, video: bool, every: float) -> Iterator[Entry]:
    """The entry cut into parts; whole where it cannot be cut, or not be read, which is told when it is."""
    seconds = _seconds(entry) if video and every else 0.0
    count = max(1, round(seconds / every)) if every else 1
    if count == 1:
        yield entry
        return
    for number in range(count):
        last = number == count - 1
        yield entry._replace(start=number * every, end=None if last else (number + 1) * every)


def _seconds(entry: Entry) -> float:
    try:
        if os.path.isfile(entry.path) and not entry.path.lower().endswith(IMAGES):
            with contextlib.closing(VideoFile(entry.path)) as media:
                return media.seconds
    except DecodeError:
        pass
    return 0.0
