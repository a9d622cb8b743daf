"""The folder in which cases run: shared parts that are built once, a folder per case, and its environment."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

from attacks.names import MARKER

ROOT = Path(__file__).parents[3]  # the checkout
TINY = f"--config={Path(__file__).with_name('tiny.py')}"
_SKIPPED = {".git", ".venv", "tests", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", "runs"}
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS")


class Part(NamedTuple):
    """The command that makes a part. Its arguments may contain other parts, which are made before."""

    module: str
    arguments: tuple[str, ...]


def _train(kind: str, *changes: str) -> Part:
    return Part("structvit_jax", ("train", f"{TINY}:{kind}", *changes))


PARTS = {
    "images": Part("attacks.build", ("images", "<images>")),
    "clips": Part("attacks.build", ("clips", "<clips>")),
    "bad_images": Part("attacks.build", ("bad_images", "<bad_images>", "<seed>")),
    "bad_videos": Part("attacks.build", ("bad_videos", "<bad_videos>", "<seed>")),
    "huge_videos": Part("attacks.build", ("huge_videos", "<huge_videos>")),
    "playlists": Part("attacks.build", ("playlists", "<playlists>", "<clips>", "<contact>")),
    "image_run": _train("images", "--config.data.root=<images>", "--workdir=<image_run>"),
    "clip_run": _train("clips", "--config.data.root=<clips>", "--workdir=<clip_run>"),
    "digits_run": _train("digits", "--workdir=<digits_run>"),
    "structvit_run": _train("structvit", "--config.data.root=<images>", "--workdir=<structvit_run>"),
    "shards": Part("structvit_jax", ("prepare", "shards", "<images>", "<shards>", "--images")),
    "maps": Part("structvit_jax", ("prepare", "label_maps", "<structvit_run>", "<maps>")),
    "weights": Part("attacks.build", ("weights", "<weights>")),
    "pickles": Part("attacks.build", ("pickles", "<pickles>", "<weights>", "<marker>")),
    "native": Part("attacks.build", ("native", "<native>")),
}


class Sandbox:
    """A folder with parts, folders of cases and shared caches, and two addresses.

    "<contact>" is HOST:PORT of a listener on the loopback interface whose connections are counted;
    "<silent>" is one at which nothing listens.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self._seed = folder, seed
        for name in ("parts", "cases", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name).chmod(0o755)
        folder.chmod(0o755)  # cases may run as another user
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        with socket.create_server(("127.0.0.1", 0)) as closed:
            silent = closed.getsockname()[1]
        self._addresses = {
            "contact": f"127.0.0.1:{self._listener.getsockname()[1]}",
            "silent": f"127.0.0.1:{silent}",
        }

    def path(self, part: str) -> Path:
        """Return the path of a part, which may not exist yet."""
        return self.folder / "parts" / part

    def new_folder(self, number: int) -> Path:
        """Create the folder of a case, with a HOME and a TMPDIR."""
        here = self.folder / "cases" / f"{number:04}"
        shutil.rmtree(here, ignore_errors=True)
        for stream in ("stdout", "stderr", "network"):
            here.with_name(f"{here.name}.{stream}").unlink(missing_ok=True)
        for name in ("home", "tmp"):
            (here / name).mkdir(parents=True)
        return here

    def fill(self, text: str, here: Path) -> str:
        """Replace names in angle brackets by paths and addresses."""
        names = {
            "here": here,
            "root": ROOT,
            "marker": self.folder / MARKER,
            "strays": self.folder / "parts",
            "seed": self._seed,
        } | self._addresses
        names |= {part: self.path(part) for part in PARTS}
        return re.sub("<([a-z_]+)>", lambda match: str(names.get(match[1], match[0])), text)

    def environment(self, here: Path) -> dict[str, str]:
        """Return the default environment of a case, which points to the sandbox and this machine only."""
        cache = self.folder / "cache"
        kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        nowhere = f"http://{self._addresses['silent']}"
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
        return (
            kept
            | proxies
            | {
                "HOME": str(here / "home"),
                "TMPDIR": str(here / "tmp"),
                "XDG_CACHE_HOME": str(cache),
                "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests/tools", "examples")),
                "PYTHONDONTWRITEBYTECODE": "1",
                "NO_GCE_CHECK": "true",
                "GCE_METADATA_HOST": self._addresses["silent"],
                "GCE_METADATA_IP": self._addresses["silent"],
                "STORAGE_EMULATOR_HOST": nowhere,
                "TENSORSTORE_GCS_HTTP_URL": nowhere,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "AWS_ENDPOINT_URL": nowhere,
                "no_proxy": "127.0.0.1,localhost",
                "LANG": "C.UTF-8",
            }
        )

    def watched(self) -> dict[str, tuple[int, int]]:
        """Return size and time of the files that no case may change: the checkout and the parts."""
        found = {}
        for top in (ROOT, self.folder / "parts"):
            for folder, folders, files in os.walk(top):
                folders[:] = [name for name in folders if name not in _SKIPPED]
                for name in files:
                    path = os.path.join(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        stat = os.lstat(path)
                        found[path] = stat.st_size, stat.st_mtime_ns
        return found

    def contacts(self) -> int:
        """Return the number of connections to "<contact>" since the last call."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
                count += 1
        return count


def needed(texts: list[str]) -> list[str]:
    """Return the parts that texts contain, and those that these need, in the order in which to make them."""
    found: list[str] = []

    def visit(text: str) -> None:
        for name in re.findall("<([a-z_]+)>", text):
            if name in PARTS and name not in found:
                for argument in PARTS[name].arguments:
                    if argument != f"<{name}>" and not argument.endswith(f"=<{name}>"):
                        visit(argument)
                found.append(name)

    for text in texts:
        visit(text)
    return found
