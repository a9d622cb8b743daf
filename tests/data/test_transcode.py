"""Copies of videos: the same frames, times and labels; interrupted, repeated and impossible runs."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import clips
import numpy as np
import pytest
from conftest import ROOT, structvit
from deadly import DeadlyLimits
from PIL import Image

from structvit_jax.data import copies, transcode
from structvit_jax.data.encode import read_record
from structvit_jax.data.index import Entry, Index, read_list
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.errors import UserError

SIDE = 48
# Name -> style and encoder options.
STYLES = {
    "left/h264.mp4": ("h264", {"g": "250"}),
    "left/transport.ts": ("h264", {}),
    "left/mpeg4.avi": ("mpeg4", {"g": "30", "bf": "2"}),
    "right/vfr.mp4": ("vfr", {}),
    "right/vp9.webm": ("vp9", {}),
    "right/rotated.mp4": ("rotated", {}),
    "right/audio.mp4": ("audio", {}),
    "right/mjpeg.avi": ("mjpeg", {}),  # full range
}


def frames(count=40, height=96, width=128):
    """Return smooth pictures, moving by 3 pixels per frame, in which all colours and directions differ."""
    y, x, t = np.ogrid[:height, :width, :count]
    grey = 127 + 60 * np.sin((x + 3 * t) / 5) + 40 * np.cos((x + 2 * y + 3 * t) / 9)
    tint = 25 * np.sin((y + np.arange(3)[:, None, None, None] * 20) / 30)
    return np.moveaxis(grey + tint, (0, 3), (3, 0)).astype(np.uint8)


def write(path, style="h264", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {key: options.pop(key) for key in ("count", "height", "width") if key in options}
    clips.write_video(path, frames(**shape), style, **options)


def prepare(source, *paths, out, side=SIDE, check=False):
    options = ["--check"] if check else []
    return structvit("prepare", source, *paths, "--out", out, f"--transcode={side}", "--workers", 1, *options)


def listed(out, split="train"):
    """Return {name of the original without extension: row of the list}."""
    return {Path(entry.path).stem: entry for entry in read_list(str(out / f"{split}.jsonl"))}


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


@pytest.fixture
def inline(monkeypatch):
    """Copy in this process, which saves the time to start others."""

    def results(function, numbers, *arguments, **options):
        return (function(number, print) for number in numbers)

    monkeypatch.setattr(transcode, "in_processes", results)


def snapshot(folder):
    """Return {file: modification time and inode} of all videos below a folder."""
    status = {path: path.stat() for path in folder.rglob("*.mp4")}
    return {path: (one.st_mtime_ns, one.st_ino) for path, one in status.items()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set, what its files were before, its copies, and what the command printed."""
    folder = tmp_path_factory.mktemp("transcode")
    root, out = folder / "data", folder / "out"
    for name, (style, options) in STYLES.items():
        write(root / "train" / name, style, **options)
    write(root / "train" / "left" / "small.mp4", height=40, width=48, g="16", sc_threshold="0")
    write(root / "train" / "left" / "odd.mp4", height=40, width=48, g="17", sc_threshold="0")
    write(root / "val" / "left" / "one.mp4", count=1)
    (root / "train" / "left" / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(root / "train" / "left" / "pictures" / "1.png")
    (root / "val" / "right").mkdir(parents=True)
    clips.write_bad(root / "val" / "right")  # one of them is damaged, but small
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*.*")}
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *values, **options: lines.append(" ".join(map(str, values))))
        code = prepare("folder", root, out=out, check=True)
    return root, before, out, code, "\n".join(lines)


@pytest.mark.parametrize("name", STYLES)
def test_a_copy_has_the_frames_of_its_original_at_the_same_times(prepared, name):
    root, _, out, *_ = prepared
    original, copy = (
        VideoFile(str(path))
        for path in (root / "train" / name, (out / "clips/train" / name).with_suffix(".mp4"))
    )
    assert (copy.count, copy.missing) == (original.count, 0) == (40, 0)
    first, other = original.times(), copy.times()
    assert [(t - first[0]) * original.unit for t in first] == [t * copy.unit for t in other]
    assert copy.key_interval() == 12
    wanted = [0, 7, 20, 33, 39]
    decoded, expected = copy.frames(wanted), original.frames(wanted, short_side=SIDE)
    assert decoded.shape == (5, 48, 64, 3)
    assert psnr(decoded, expected) > 35
    assert psnr(copy.frames([1, 8, 21, 34, 38]), expected) < 28
    if name != "right/vfr.mp4":
        assert copy.seconds == pytest.approx(original.seconds)


def test_lists_name_copies_or_originals(prepared):
    root, before, out, code, text = prepared
    assert code == 1  # --check reports the damaged files
    train, val = listed(out), listed(out, "val")
    assert {train[Path(name).stem].path for name in STYLES} == {
        f"clips/train/{name.rpartition('.')[0]}.mp4" for name in STYLES
    }
    assert {Path(entry.path).stem: entry.label for entry in train.values()} == {
        Path(name).stem: Path(name).parts[0] for name in STYLES
    } | {"small": "left", "odd": "left", "pictures": "left"}
    assert train["odd"].path == "clips/train/left/odd.mp4" and val["one"].path == "clips/val/left/one.mp4"
    assert train["small"].path == str(root / "train/left/small.mp4")
    assert train["pictures"].path == str(root / "train/left/pictures")
    damaged = {name: entry.path for name, entry in val.items() if name != "one"}
    assert len(damaged) == 8 and all(path.startswith(str(root)) for path in damaged.values())
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert sorted(os.listdir(out)) == [
        *("bad_files.txt", "clips", "clips.lock", "labels.txt", "train.jsonl", "val.jsonl")
    ]
    assert "copies  10 made" in text and "damaged or unreadable (see above): 7" in text
    assert "small, with frequent key frames: 2" in text and "folders of frames: 1" in text
    dataset = clips.load(name="folder", root=str(out))
    assert (dataset.train_examples, dataset.class_names) == (11, ("left", "right"))


def test_quality_and_size_are_recorded(prepared):
    *_, out, _, text = prepared
    made = list((out / "clips").rglob("*.mp4"))
    records = [read_record(str(path)) for path in made]
    assert all(record.psnr > 35 and 0.95 < record.ssim <= 1 for record in records)
    assert f"PSNR    median {np.median([record.psnr for record in records]):.1f} dB" in text
    assert f"lowest {min(record.ssim for record in records):.4f}" in text
    content = made[0].read_bytes()
    for cut in (1, 100, len(content) // 2):
        made[0].with_suffix(".cut").write_bytes(content[:-cut])
        assert read_record(str(made[0].with_suffix(".cut"))) is None
    made[0].with_suffix(".cut").unlink()


def test_parts_select_the_same_frames(inline, tmp_path):
    """The unit of time of an AVI file is a frame, so its parts are rounded more than those of a copy."""
    rows = []
    for name, style in (("a.avi", "mpeg4"), ("b.mp4", "vfr"), ("c.mp4", "h264"), ("d.webm", "vp9")):
        write(tmp_path / name, style, rate=Fraction(30000, 1001))
        for start, end in ((None, 0.64), (0.47, 1.01), (0.5, None), (1.23, 99)):
            rows.append({"path": name, "label": "x", "start": start, "end": end})
    rows.append({"path": "c.mp4", "label": "y"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert prepare("list", tmp_path / "train.jsonl", out=out) == 0
    assert len(list((out / "clips").iterdir())) == 4
    old = Index(str(tmp_path), read_list(str(tmp_path / "train.jsonl")), "xy")
    new = Index(str(out), read_list(str(out / "train.jsonl")), "xy")
    assert len(new) == len(old) == 17 and new.labels.tolist() == old.labels.tolist()
    for number in range(len(old)):
        before, after = old.media(number), new.media(number)
        assert before.count == after.count, old.id(number)
        ends = [0, before.count - 1]
        assert psnr(before.frames(ends, SIDE), after.frames(ends)) > 35, old.id(number)
        old_part, new_part = old.entry(number)[1:], new.entry(number)[1:]  # label, start and end
        if old.entry(number).path.endswith("avi"):
            assert [time is None for time in old_part[1:]] == [time is None for time in new_part[1:]]
        else:
            assert old_part == new_part
    written = (out / "train.jsonl").read_bytes()
    assert prepare("list", tmp_path / "train.jsonl", out=out) == 0
    assert (out / "train.jsonl").read_bytes() == written


def test_a_second_run_copies_only_what_changed(inline, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    for name in ("a", "b", "c"):
        write(root / "x" / f"{name}.mp4", count=5)
    prepare("folder", root, out=out)
    first = snapshot(out)
    assert len(first) == 3
    (out / "clips.unfinished").mkdir()
    (out / "clips.unfinished" / "0.mp4").write_bytes(b"of a killed run")
    prepare("folder", root, out=out)
    assert (
        snapshot(out) == first
        and "copies  0 made (0 frames, 0 per second), 3 kept" in capsys.readouterr().out
    )
    write(root / "x" / "b.mp4", count=7)
    broken = out / "clips/x/c.mp4"
    broken.write_bytes(broken.read_bytes()[:-20])
    prepare("folder", root, out=out)
    second = snapshot(out)
    assert {path.name for path in first if first[path] != second[path]} == {"b.mp4", "c.mp4"}
    assert VideoFile(str(out / "clips/x/b.mp4")).count == 7
    prepare("folder", root, out=out, side=32)
    assert not set(snapshot(out).values()) & set(second.values())


def test_a_killed_run_leaves_only_complete_copies(tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    for number in range(12):
        write(root / "x" / f"{number}.mp4", height=160, width=200)
    request = f"Request('folder', [{str(root)!r}], out={str(out)!r}, transcode=96, workers=2)"
    command = f"from structvit_jax.data.preparation import Request, run; run({request})"
    for wanted in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stderr=subprocess.DEVNULL)
        while len(snapshot(out / "clips")) < wanted:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        made = snapshot(out / "clips")
        assert wanted <= len(made) < 12 and not (out / "train.jsonl").exists()
        for path in made:
            assert read_record(str(path)).frames == VideoFile(str(path)).count == 40
    prepare("folder", root, out=out, side=96)
    assert (
        made.items() <= snapshot(out / "clips").items() and len(listed(out)) + len(listed(out, "val")) == 12
    )
    assert not (out / "clips.unfinished").exists()


def test_a_full_disk_is_reported_before_it_is_full(inline, tmp_path, monkeypatch):
    root, out = tmp_path / "data", tmp_path / "out"
    for number in range(6):
        write(root / "x" / f"{number}.mp4", count=5)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"the remaining copies need about \d.*B, but 100B is free"):
        prepare("folder", root, out=out)
    assert len(snapshot(out)) == 3 and not (out / "clips.unfinished").exists()
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(transcode._Run, "_results", full)
        with pytest.raises(UserError, match=r"is free\. Free some space and re-run"):
            prepare("folder", root, out=out)
    assert prepare("folder", root, out=out) == 0
    assert len(snapshot(out)) == 6


def test_names_of_copies_differ(inline, tmp_path):
    long, odd = "x" * 251, os.fsdecode(b"\xff odd\n")
    paths = ["/d/a/1.avi", "/d/a/1.mp4", "/d/A/2.mp4", "/d/a/2.mp4", "/d/clip.v1", "/d/clip.v2", "/e/a/3.mkv"]
    paths += [f"/d/{long}.ts", f"/d/{'x' * 250}.ts", f"/d/{odd}.mp4", "/d/..f/4.mp4"]
    names = copies.choose_names(paths, "/d")
    assert [names[path] for path in paths[4:7]] == ["clip.v1.mp4", "clip.v2.mp4", "e/a/3.mp4"]
    assert names[f"/d/{odd}.mp4"] == f"{odd}.mp4" and names["/d/..f/4.mp4"] == "..f/4.mp4"
    assert len({name.lower() for name in names.values()}) == len(paths)
    assert all(len(os.fsencode(os.path.basename(name))) <= 255 for name in names.values())
    assert all(name.endswith(".mp4") and not name.startswith(("/", "../")) for name in names.values())
    write(tmp_path / "data/x/1.avi", "mpeg4", count=3)
    write(tmp_path / "data/x/1.mp4", count=4)
    write(tmp_path / "data/x/2.mp4", count=5)
    os.rename(tmp_path / "data/x/2.mp4", tmp_path / "data/x" / f"{odd}.mp4")
    prepare("folder", tmp_path / "data", out=tmp_path / "out")
    rows = [*listed(tmp_path / "out").values(), *listed(tmp_path / "out", "val").values()]
    assert sorted(VideoFile(str(tmp_path / "out" / row.path)).count for row in rows) == [3, 4, 5]


def test_a_file_that_kills_its_process_keeps_its_original(tmp_path, capsys):
    for name, width in (("a", 64), ("b", 36), ("c", 64)):
        write(tmp_path / f"{name}.mp4", width=width, count=20)
    entries = [Entry(f"{name}.mp4", "x") for name in "abc"]
    splits = {"train": Index(str(tmp_path), entries, "x", limits=DeadlyLimits())}
    index = transcode.transcode(splits, str(tmp_path), (), str(tmp_path / "out"), 32, 2)["train"]
    assert sorted(map(index.path, range(3))) == [
        str(tmp_path / name) for name in ("b.mp4", "out/clips/a.mp4", "out/clips/c.mp4")
    ]
    assert "b.mp4: kills the process that copies it" in capsys.readouterr().out


def test_originals_are_never_in_the_way(inline, tmp_path):
    root = tmp_path / "data"
    write(root / "train/x/a.mp4", count=3)
    write(root / "val/x/a.mp4", count=3)
    write(tmp_path / "other/clips/x/a.mp4", count=3)
    (root / "list.csv").write_text("path,label\ntrain/x/a.mp4,x\n")
    (tmp_path / "list.csv").write_text("path,label\nother/clips/x/a.mp4,x\n")
    folder, rows, others = ("folder", root), ("list", root / "list.csv"), ("list", tmp_path / "list.csv")
    for source, out, message in (
        (folder, "", "needs --out=DIR"),
        (folder, root, "holds the data themselves"),
        (rows, root, "holds the data themselves"),
        (folder, root / "small", "is in the data folder"),
        (others, tmp_path / "other", "holds originals"),
        (folder, tmp_path / "other", "clips was not written by --transcode"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(*source, out=out)
    with pytest.raises(UserError, match="16 is not in the range x>=32"):
        prepare(*folder, out=tmp_path / "out", side=16)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/clips.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing copies"):
            prepare(*folder, out=tmp_path / "out")
    assert prepare(*rows, out=root / "small") == 0  # only a folder that is searched may not hold the copies
    assert listed(root / "small", "list")["a"].path == "clips/train/x/a.mp4"
