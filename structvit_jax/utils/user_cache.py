"""Private cache folders for compiled code."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def user_folder(name: str) -> tuple[Path | None, str]:
    """Create a private folder in the user's cache; return it, or None and the reason why there is none.

    Code is loaded from this folder, so nobody else may write there. The folder must belong to this user and
    have mode 0700, and no folder above it may be writable by everybody (except with the sticky bit, as /tmp).

    Args:
      name: of the folder in XDG_CACHE_HOME/structvit_jax. XDG_CACHE_HOME is ~/.cache by default.
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
        if risk := _write_risk(folder):
            return None, risk
        folder.chmod(0o700)
    except OSError as error:
        return None, f"{error.filename or folder} cannot be used: {error.strerror or error}"
    return folder, ""


def _write_risk(folder: Path) -> str:
    """Say how other users could write into a folder or replace it; return "" if they cannot."""
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return f"{folder} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write into {folder}; remove it"
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"others can write into {parent}, so they could replace {folder}"
    return ""
