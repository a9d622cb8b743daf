"""Private cache folders for compiled code."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def user_folder(name: str) -> tuple[Path | None, str]:
    """Create a private folder in the user's cache; return it, or None and the reason why there is none.

    Code is loaded from these folders, so nobody else may write there: the folder belongs to this user, has
    mode 0700, and no folder above it is writable by everybody.

    Args:
      name: the folder is XDG_CACHE_HOME/structvit_jax/`name`; XDG_CACHE_HOME is ~/.cache by default.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # HOME is not set, and the user has no entry in the password database
        return None, "there is no home folder; set XDG_CACHE_HOME"
    folder = Path(root, "structvit_jax", name)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = folder.resolve(strict=True)
        if writer := _other_writer(folder):
            return None, writer
        folder.chmod(0o700)
    except OSError as error:
        return None, f"{error.filename or folder} cannot be used: {error.strerror or error}"
    return folder, ""


def _other_writer(folder: Path) -> str:
    """Return how other users could write into a folder or replace it; "" if they cannot."""
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return f"{folder} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write into {folder}; remove it"
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"others can write into {parent}, and replace {folder}"
    return ""
