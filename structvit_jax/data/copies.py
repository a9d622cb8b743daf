"""The folder of the copies that `structvit prepare --transcode` makes: DIR/clips, and what protects it.

Files are written in DIR/clips.unfinished and then moved to DIR/clips. DIR/clips.lock is held by the run that
writes them, so what earlier runs left unfinished can be removed.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence

from structvit_jax.data.media import without_extension
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import write_errors_as_user_error

CLIPS = "clips"
_UNFINISHED = "clips.unfinished"
_LOCK = "clips.lock"
_NAME_LIMIT = 255  # bytes in the name of a file


def check_folder(out: str, searched: Iterable[str], originals: Iterable[str]) -> None:
    """Check that copies in a folder can neither replace other files nor be found as data.

    Args:
      out: the folder.
      searched: folders that are searched for data.
      originals: absolute paths of the files to copy.

    Raises:
      UserError: they can.
    """
    for source in map(_resolved, searched):
        if _resolved(out).startswith(source):
            raise UserError(
                f"{out} is in the data folder {source}; choose a folder for the copies outside it"
            )
    clips = os.path.join(out, CLIPS)
    folders = {os.path.dirname(path) for path in originals}
    if any(_resolved(folder).startswith(_resolved(clips)) for folder in folders):
        raise UserError(f"{clips} holds originals, which copies might replace; choose another --out")
    if not os.path.exists(os.path.join(out, _LOCK)):
        for path in (clips, os.path.join(out, _UNFINISHED)):
            if os.path.lexists(path):
                raise UserError(f"{path} was not written by --transcode; remove it or choose another --out")


def _resolved(folder: str) -> str:
    """Return the absolute path of a folder without links, with a separator at the end."""
    return os.path.join(os.path.realpath(folder), "")


def choose_names(paths: Sequence[str], base: str) -> dict[str, str]:
    """Return a different name for the copy of each path, relative to the folder of copies.

    Names follow those of the originals in the folder `base`, or their absolute paths if they are elsewhere.
    """
    names = {}
    for path in paths:
        name = os.path.relpath(path, base)
        is_inside = not name.startswith(os.pardir + os.sep)
        names[path] = without_extension(name if is_inside else path.lstrip(os.sep)) + ".mp4"
    same = collections.Counter(name.casefold() for name in names.values())  # some disks ignore case
    for path, name in names.items():
        folder, short = os.path.split(name)
        if same[name.casefold()] > 1 or len(os.fsencode(short)) > _NAME_LIMIT:
            ending = f"-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}.mp4"
            stem = os.fsencode(short.removesuffix(".mp4"))[: _NAME_LIMIT - len(ending)]
            names[path] = os.path.join(folder, os.fsdecode(stem) + ending)
    return names


@contextlib.contextmanager
def only_run(out: str) -> Iterator[str]:
    """Hold the lock of a folder, which the system releases however the process ends.

    Yields:
      An empty folder for unfinished files; it is removed at the end.

    Raises:
      UserError: another run holds the lock, or the folder cannot be written.
    """
    folder = os.path.join(out, _UNFINISHED)
    with contextlib.ExitStack() as stack:
        with write_errors_as_user_error(out):
            os.makedirs(out, exist_ok=True)
            lock = stack.enter_context(open(os.path.join(out, _LOCK), "ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another run is writing copies to {out}; wait until it ends") from error
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder, exist_ok=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def sync(folders: Iterable[str]) -> None:
    """Wait until the names of the files in some folders are on the disk."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
