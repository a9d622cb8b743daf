"""SHA-256 digests of the files of a checkpoint, stored in its folder.

They are needed because Orbax does not detect bytes that have changed.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Iterator

from etils import epath

from structvit_jax.runtime.storage import read_json, write_json
from structvit_jax.utils.errors import UserError

FILE = "sha256.json"
_CHUNK = 2**24  # bytes


def write_digests(folder: epath.Path) -> None:
    """Write the digests of all files in a folder and its subfolders into sha256.json in that folder."""
    write_json(folder / FILE, _digests(folder, sorted(_files(folder, ""))))


def find_damage(folder: epath.Path, prefix: str = "") -> str:
    """Compare the files of a folder with its digests; return the first difference, "" if there is none.

    Args:
      folder: the folder, in which `write_digests` has stored the digests.
      prefix: compare only files whose names start with this, for example "card/".

    Raises:
      UserError: permissions forbid reading a file. This is not damage.
    """
    try:
        written = read_json(folder / FILE)
        if not written:
            return f"{FILE} is damaged"
        written = {name: digest for name, digest in written.items() if name.startswith(prefix)}
        missing = sorted(written.keys() - set(_files(folder, "")))
        if missing:
            return f"{missing[0]} is missing"
        found = _digests(folder, sorted(written))
    except PermissionError as error:
        path = error.filename or folder
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except FileNotFoundError as error:
        if error.filename and str(error.filename) != str(folder / FILE):
            return f"{error.filename} is missing"
        return f"it has no {FILE}"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    changed = [name for name in written if written[name] != found[name]]
    return f"{changed[0]} is not what was saved" if changed else ""


def _files(folder: epath.Path, prefix: str) -> Iterator[str]:
    """Yield `prefix` + relative path for each file in a folder and its subfolders, except the digests."""
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _files(path, name + "/")
        elif name != FILE:
            yield name


def _digests(folder: epath.Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        value = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                value.update(chunk)
        return value.hexdigest()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # to hide the latency of a bucket
        return dict(zip(names, pool.map(digest, names), strict=True))
