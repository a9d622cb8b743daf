"""The folder of a run's checkpoints: list its steps, and commit a save together with its digests."""

from __future__ import annotations

import asyncio

from etils import epath
from orbax.checkpoint.path import atomicity

from structvit_jax.runtime.digests import FILE, write_digests
from structvit_jax.runtime.storage import read_json, write_json
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import is_bucket

FOLDER = "checkpoints"  # in a workdir


class OnDisk(atomicity.AtomicRenameTemporaryPath):
    """A save on a disk: writes the digests between Orbax's last write and the rename that commits it."""

    async def finalize(self) -> None:
        final = self.get_final()
        if not _is_checkpoint(final):
            await super().finalize()
            return
        # Still a temporary name, which is removed after a kill.
        self._final_path = self._tmp_path.with_name(self._tmp_path.name + "-written")
        await super().finalize()
        await asyncio.to_thread(write_digests, self._final_path)
        await asyncio.to_thread(self._final_path.rename, final)
        self._final_path = final


class InBucket(atomicity.CommitFileTemporaryPath):
    """A save in a bucket, which cannot rename: the digest file is empty until the save is finished."""

    async def create(self) -> epath.Path:
        path = await super().create()
        if _is_checkpoint(path):
            await asyncio.to_thread(write_json, path / FILE, {})
        return path

    async def finalize(self) -> None:
        await super().finalize()
        if _is_checkpoint(self.get_final()):
            await asyncio.to_thread(write_digests, self.get_final())


def _is_checkpoint(path: epath.Path) -> bool:
    """Return whether this is the folder of a step, and not of one of its items."""
    return path.parent.name == FOLDER


def is_unfinished(path: epath.Path) -> bool:
    """Return whether a save was not finished: on a disk its name is temporary, in a bucket it has no digests.

    A committed save in a bucket without a valid digest file is damaged instead.
    """
    if not is_bucket(path):
        return atomicity.TMP_DIR_SUFFIX in path.name
    if (path / FILE).exists():
        return read_json(path / FILE) == {}
    return is_step(path) and not (path / atomicity.COMMIT_SUCCESS_FILE).exists()


def is_step(path: epath.Path) -> bool:
    """Return whether the name of a folder is a step, as written by `str`."""
    name = path.name
    return name.isascii() and name.isdecimal() and len(name) <= 18 and str(int(name)) == name


def entries(folder: epath.Path) -> list[epath.Path]:
    """Return the content of a folder of checkpoints; [] if it does not exist."""
    try:
        return list(folder.iterdir()) if folder.exists() else []
    except NotADirectoryError as error:
        raise UserError(
            f"{folder} is a file, but a run stores its checkpoints there; move it away"
        ) from error


def steps_in(folder: epath.Path) -> list[int]:
    """Return the finished steps in a folder, newest first."""
    paths = [path for path in entries(folder) if is_step(path) and not is_unfinished(path)]
    return sorted((int(path.name) for path in paths), reverse=True)
