"""Compile C++ sources of the package with the compiler of the machine, on first use, and load the result.

The library is kept in a private folder of the user's cache. Its file name contains a digest of what it was
built from (sources, compiler, processor), and a digest of the file itself, which is checked before the
library is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from structvit_jax.utils import user_cache

FAILURES = (OSError, subprocess.SubprocessError)  # there is no compiler, or it fails
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")


def load(
    name: str,
    sources: Sequence[Path],
    options: Sequence[str],
    *,
    include: Path | None = None,
    headers: Sequence[Path] = (),
) -> ctypes.CDLL:
    """Load the library that is compiled from sources; build it unless the cache has an unchanged one.

    Args:
      name: start of its file name.
      sources: files to compile.
      options: further options of the compiler.
      include: folder to search for headers.
      headers: other files that the library depends on.

    Raises:
      OSError, subprocess.SubprocessError: see FAILURES.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    command = [compiler, *_OPTIONS, *options]
    key = _digest(_ingredients(command, [*sources, *headers]))[:16]
    arguments = [*(["-I", str(include)] if include else []), *map(str, sources)]
    folder, problem = user_cache.user_folder("native")
    if folder:
        return ctypes.CDLL(str(_cached(folder, f"{name}-{key}", [*command, *arguments])))
    print(f"note: {problem}; C++ is compiled again for this process only", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:  # a loaded library outlives its file
        return ctypes.CDLL(str(_build([*command, *arguments], Path(scratch))))


def _cached(folder: Path, start: str, command: Sequence[str]) -> Path:
    """Return the path of the cached library; build it if needed, and remove files with a wrong digest."""
    for path in folder.glob(f"{start}-*.so"):
        if path.is_file() and path.name == _name(start, path):
            return path
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _build(command, Path(scratch))
        path = folder / _name(start, built)
        os.replace(built, path)  # atomic: another process may do the same
    return path


def _name(start: str, path: Path) -> str:
    return f"{start}-{_digest(path.read_bytes())}.so"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _ingredients(command: Sequence[str], files: Sequence[Path]) -> bytes:
    """Return what the library depends on: options, the compiler's macros for this processor, and files."""
    macros = subprocess.run([*command, "-E", "-dM", "-x", "c++", os.devnull], capture_output=True, check=True)
    return b"".join([" ".join(command).encode(), macros.stdout, *(path.read_bytes() for path in files)])


def _build(command: Sequence[str], folder: Path) -> Path:
    """Compile the library into a folder; only this user can read the file."""
    built = folder / "native.so"
    subprocess.run([*command, "-o", str(built)], capture_output=True, check=True)
    built.chmod(0o700)
    return built
