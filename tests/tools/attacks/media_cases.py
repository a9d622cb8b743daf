"""Damaged images and videos, decompression bombs, and files that refer to others."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from attacks.case import Case, Result
from attacks.commands import CLIP, DIGITS, IMAGE, IMAGE_FOLDER, case, nothing_executed, train
from attacks.names import DAMAGES, IMAGE_FORMATS, VIDEO_FORMATS

_case = functools.partial(case, "media")
_train = functools.partial(train, "media")

# Files of a part, and whether they have to be read (True), refused (False), or either (None).
_IMAGES = {
    "bomb_wide.png": False,
    "bomb_square.png": False,
    "bomb_largest.png": False,
    "bomb.gif.png": None,
    "bomb.jpg": False,
    "bomb.ppm": False,
    "digits.ppm": False,
    "eps_named.jpg": False,
    "svg_named.png": False,
    "mp4_named.jpg": False,
    "page.png": False,
    "png_named.jpg": None,
    "folder.jpg": None,
    "dangling.jpg": False,
    "loop.jpg": False,
    "fifo.jpg": False,
    "zero.png": False,
}
_VIDEOS = {
    "announced.mkv": None,
    "nan.mkv": None,
    "cut.mp4": True,
    "page.mp4": False,
    "png_named.mp4": None,
    "folder.mp4": None,
    "frames": None,
    "fifo.mp4": False,
    "zero.mp4": False,
}
_PLAYLISTS = {
    "m3u8": ("local", "file", "address", "itself", "live", "key", "rtsp", "lavfi"),
    "ffconcat": ("concat", "concat_itself", "concat_address", "concat_device"),
    "sdp": ("sdp",),
    "mpd": ("dash", "dash_address"),
    "asx": ("asx",),
    "xspf": ("xspf",),
}


def cases() -> Iterator[Case]:
    for kind in IMAGE_FORMATS:
        yield from _all_damages("image", "bad_images", kind, IMAGE)
    for kind in VIDEO_FORMATS:
        yield from _all_damages("clip", "bad_videos", kind, CLIP)
    for part, kind, files in (("bad_images", "image", _IMAGES), ("bad_videos", "clip", _VIDEOS)):
        for name, read in files.items():
            yield from _one(kind, f"<{part}>/{name}", read)
    yield from _one("clip", "<huge_videos>/16000.mp4", None)
    for own, names in _PLAYLISTS.items():
        for name in names:
            for ending in ("mp4", own):
                yield from _one("clip", f"<playlists>/{name}.{ending}", False)
    yield from _in_training()


def _all_damages(model: str, part: str, kind: str, whole: str) -> Iterator[Case]:
    """Attack with all damages of a format in one command, between two valid files."""
    paths = [whole, *(f"<{part}>/{damage}.{kind}" for damage in DAMAGES), f"<{part}>/whole.{kind}"]
    name = f"{len(DAMAGES)} damaged .{kind}"
    check = functools.partial(_a_line_for_each, count=len(paths))
    yield _case(f"predict {name}", "predict", f"<{model}_run>", *paths, check=check, codes=(0, 2))
    yield _check(name, model, paths, (0, 1, 2))


def _one(model: str, path: str, read: bool | None) -> Iterator[Case]:
    """Attack with a file beside a valid one; for `read` see `_IMAGES`."""
    whole = IMAGE if model == "image" else CLIP
    codes = {True: (0,), False: (2,), None: (0, 2)}[read]
    name = re.sub("[<>]", "", path)
    is_folder = path.endswith(("folder.jpg", "folder.mp4"))  # an empty folder is refused as a whole
    yield _case(
        f"predict {name}",
        "predict",
        f"<{model}_run>",
        whole,
        path,
        codes=codes,
        check=None if is_folder else functools.partial(_a_line_for_each, count=2),
        seconds=30,
    )
    codes = {True: (0,), False: (1, 2), None: (0, 1, 2)}[read]
    yield _check(name, model, [whole, path], codes, seconds=30)


def _check(name: str, model: str, paths: Sequence[str], codes: tuple[int, ...], **options) -> Case:
    """Check a list with `prepare list`."""
    arguments = ["<here>/bad.csv", "--check", "--workers=1", *(["--images"] * (model == "image"))]
    return _case(
        f"check {name}",
        "prepare list",
        *arguments,
        codes=codes,
        needs=tuple(re.findall("<([a-z_]+)>", " ".join(paths))),
        prepare=functools.partial(_write_list, paths),
        **options,
    )


def _write_list(paths: Sequence[str], here: Path, chance: random.Random) -> None:
    del chance
    parts = here.parent.parent / "parts"
    rows = (f"{parts / re.sub('[<>]', '', path)},{'xy'[i % 2]}" for i, path in enumerate(paths))
    (here / "bad.csv").write_text("path,label\n" + "\n".join(rows) + "\n")


def _a_line_for_each(here: Path, result: Result, *, count: int) -> str:
    """Check that each file has a line, the first has a class, and no code was executed."""
    lines = result.stdout.splitlines()
    if result.code == 0 and any("cannot be" in line for line in lines):
        return "exit code 0 although a file could not be read"
    if not result.killed and len(lines) != count:
        return f"{len(lines)} lines for {count} files"
    if not result.killed and not re.search(r" [01]\.\d{3}", lines[0]):
        return "a valid file was not read"
    return nothing_executed(here, result)


def _in_training() -> Iterator[Case]:
    """Train with a bad example among good ones, which must not stop the run."""
    for name in ("bomb_wide.png", "bomb_square.png", "cut_50.png", "fifo.jpg", "eps_named.jpg", "zero.png"):
        put = functools.partial(_put, f"bad_images/{name}", f"images/train/one/{name}")
        yield _train(
            f"train with {name}",
            "--config.data.root=<here>/images",
            config=IMAGE_FOLDER[0],
            copies=("images",),
            needs=("bad_images",),
            prepare=put,
            codes=(0,),
            check=nothing_executed,
        )
    clips = f"{DIGITS.rpartition(':')[0]}:clips"
    for name in ("frames", "announced.mkv", "flip_100.mp4", "png_named.mp4"):
        put = functools.partial(_put, f"bad_videos/{name}", f"clips/train/one/{name}")
        yield _train(
            f"train with {name}",
            "--config.data.root=<here>/clips",
            config=clips,
            copies=("clips",),
            needs=("bad_videos",),
            prepare=put,
            codes=(0,),
            seconds=90,
        )
    for name in ("local.m3u8", "address.mp4", "sdp.mp4"):
        put = functools.partial(_put, f"playlists/{name}", f"clips/train/one/{name}.mp4")
        yield _train(
            f"train with {name}",
            "--config.data.root=<here>/clips",
            config=clips,
            copies=("clips",),
            needs=("playlists",),
            prepare=put,
            codes=(0,),
            seconds=90,
        )


def _put(source: str, target: str, here: Path, chance: random.Random) -> None:
    """Link a file of the sandbox into the data of a case."""
    del chance
    (here / target).symlink_to(here.parent.parent / "parts" / source)
