"""Folders of videos: equal batches for any storage, workers and hosts; damaged files; training to a score."""

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import clips
import numpy as np
import pytest
from clips import load, same, take
from etils import epath
from PIL import Image

from structvit_jax.data import Problem
from structvit_jax.data.media import open_media
from structvit_jax.training.log import Unreadable
from structvit_jax.utils.errors import UserError

AUGMENT = {
    "augment__crop_area": (0.3, 1.0),
    "augment__crop_aspect": (0.75, 1.33),
    "augment__flip": 0.5,
    "augment__randaugment": "rand-m7-n2-mstd0.5-inc1",
}
VIDEO = {"name": "folder", "size": 24, "frames": 6, "sampling": "segment"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """39 files for training and 9 for testing."""
    root = tmp_path_factory.mktemp("clips")
    clips.write_folder(root, {"train": 13, "val": 3})
    return root


def files(root, split="train"):
    return [path for path in sorted((root / split).rglob("*.*")) if path.is_file()]


def write_csv(path, rows, header=("path", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def test_the_same_batches_from_folders_lists_and_frames(root, tmp_path):
    """Bit for bit: the frames of the third folder are decoded and written as PNG."""
    listed, framed = tmp_path / "listed", tmp_path / "framed"
    listed.mkdir()
    for split in ("train", "val"):
        rows = [(os.path.relpath(path, listed), path.parent.name) for path in files(root, split)]
        write_csv(listed / f"{split}.csv", rows[::-1])
        for path in files(root, split):
            folder = framed / path.relative_to(root).with_suffix("")
            folder.mkdir(parents=True)
            video = open_media(str(path))
            for number, frame in enumerate(video.frames(range(video.count)), 1):
                Image.fromarray(frame).save(folder / f"{number}.png")
    datasets = [load(root=str(place), **VIDEO, **AUGMENT) for place in (root, listed, framed)]
    assert [dataset.train_examples for dataset in datasets] == [39, 39, 39]
    trained = [take(dataset.train_batches(13, start_step=2), 3) for dataset in datasets]
    tested = [take(dataset.test_batches(4), 3) for dataset in datasets]
    for other in (1, 2):
        assert all(map(same, trained[0], trained[other]))
        assert all(map(same, tested[0], tested[other]))


def test_the_same_batches_for_any_number_of_workers_and_hosts(root):
    """Also when resuming within the second epoch, with copies of an example split over batches and hosts."""
    setting = {"root": str(root), **VIDEO, **AUGMENT, "augment__repeated_augmentation": 3}
    whole = take(load(**setting).train_batches(8, start_step=0), 24)  # an epoch has 117 rows: 14.6 steps
    tests = take(load(**setting, test_clips=2).test_batches(4), 3)
    for workers in (2, 3):
        dataset = load(**setting, workers=workers, test_clips=2)
        resumed = take(dataset.train_batches(8, start_step=21), 3)
        assert all(map(same, resumed, whole[21:])), workers
        assert all(map(same, take(dataset.test_batches(4), 3), tests)), workers
    for hosts in (2, 4):
        shards = [
            take(load(**setting).train_batches(8, start_step=13, shard=(host, hosts)), 3)
            for host in range(hosts)
        ]
        for step in range(3):
            for key in ("inputs", "labels", "mask", "index"):
                together = np.concatenate([shard[step][key] for shard in shards])
                assert (together == whole[13 + step][key]).all(), (hosts, key)


def test_every_epoch_has_all_examples_and_draws_of_its_own(root):
    dataset = load(root=str(root), **VIDEO, **AUGMENT, augment__repeated_augmentation=2)
    assert dataset.rows_per_epoch == 78
    first, second = take(dataset.train_batches(78, start_step=0), 2)
    assert (first["index"] != second["index"]).any()
    for batch in (first, second):
        assert sorted(batch["index"]) == sorted([*range(39), *range(39)])
        assert (batch["index"][::2] == batch["index"][1::2]).all()  # copies are neighbours
        assert (batch["inputs"][::2] != batch["inputs"][1::2]).any(axis=(1, 2, 3, 4)).all()
    at = [int(np.flatnonzero(batch["index"] == 5)[0]) for batch in (first, second)]
    assert (first["inputs"][at[0]] != second["inputs"][at[1]]).any()


def test_copies_share_their_frames(root):
    """Repeated augmentation draws new pixels for each copy, but not new frames."""
    plain = load(root=str(root), **VIDEO, augment__repeated_augmentation=2)
    (batch,) = take(plain.train_batches(8, start_step=0), 1)
    assert (batch["inputs"][::2] == batch["inputs"][1::2]).all()


def test_views_are_clips_times_crops(root):
    """Views are clips x crops, clip by clip."""
    dataset = load(root=str(root), **{**VIDEO, "size": 32}, test_clips=2, test_crops=3)
    (batch,) = take(dataset.test_batches(2), 1)
    assert batch["inputs"].shape == (2, 6, 6, 32, 32, 3)
    views = batch["inputs"][0]
    assert (views[0] != views[3]).any() and (views[0] == views[1]).all()  # square: crops are the same
    one = load(root=str(root), **{**VIDEO, "size": 32})
    assert (take(one.test_batches(2), 1)[0]["labels"] == batch["labels"]).all()


def test_a_killed_worker_is_reported_with_its_example(root):
    dataset = load(root=str(root), **VIDEO, workers=2)
    stream = dataset.train_batches(8, start_step=0)
    for _ in range(4):  # both workers have read
        next(stream)
    started = time.monotonic()
    children = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_worker(int(pid))]
    assert children
    os.kill(children[0], signal.SIGKILL)
    with pytest.raises(
        UserError, match=rf"pid {children[0]}\) died with exit code -9 while reading train/\w+/\d+"
    ):
        for _ in range(50):
            next(stream)
    assert time.monotonic() - started < 20
    stream.close()


def is_worker(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return int(stat[1]) == os.getpid() and "workers.py" in command


@pytest.mark.parametrize(
    "arrange, message",
    [
        (lambda r: None, "neither a folder 'train' nor a list"),
        (lambda r: (r / "train.csv").write_text(""), "train.csv is empty"),
        (lambda r: (r / "train.csv").write_text("path,label\n"), "train.csv is empty"),
        (lambda r: (r / "train" / "a").mkdir(parents=True), "train is empty: there are no videos"),
        (lambda r: (r / "train.csv").write_text("path,label\na.mp4\n"), "train.csv:2: a line needs"),
        (lambda r: (r / "train.csv").write_text("path,label,start\na.mp4,x,soon\n"), "train.csv:2:"),
        (lambda r: (r / "train.csv").write_text("path,label\n,x\n"), "path or label is empty"),
        (lambda r: (r / "train.jsonl").write_text('{"path": "a.mp4"\n'), "train.jsonl:1:"),
        (lambda r: (r / "train.jsonl").write_text('{"path": "a.mp4", "label": null}\n'), "label is empty"),
        (lambda r: (r / "train.csv").write_text("path,label\na.mp4,x,y\n"), "train.csv:2: a line needs"),
        (lambda r: (r / "train.csv").write_text("filename,label\na.mp4,x\n"), "one of them must be path"),
        (lambda r: (r / "train.csv").write_bytes(b"path,label\na.mp4,\xe9\n"), "save it as UTF-8"),
        (lambda r: (r / "train.csv").write_text("path,label,start\na.mp4,x,inf\n"), "train.csv:2:"),
        (lambda r: (r / "train.csv").write_text("path,label\na\0.mp4,x\n"), "zero byte"),
        (lambda r: (r / "train.jsonl").write_text(r'{"path": "\ud800.mp4", "label": "x"}'), "surrogate"),
        (lambda r: (r / "train.jsonl").write_text("[" * 100_000 + "\n"), "train.jsonl:1:"),
        (
            lambda r: (r / "train.jsonl").write_text(
                '{"path": "a.mp4", "label": "x", "end": 1' + "0" * 4000 + "}\n"
            ),
            "train.jsonl:1:",
        ),
        (lambda r: os.mkfifo(r / "train.csv"), "train.csv is not a regular file"),
        (lambda r: (r / "train.csv").symlink_to("/dev/zero"), "train.csv is not a regular file"),
        (
            lambda r: [(r / "train").mkdir(), (r / "train.csv").write_text("")],
            "train/ and train.csv; choose one with --config.data.train_split=train/ or"
            " --config.data.train_split=train.csv",
        ),
        (
            lambda r: [(r / "train").mkdir(), (r / "train" / "a.mp4").write_text("")],
            "a.mp4 is beside the class folders",
        ),
    ],
)
def test_unusable_folders_and_lists_are_rejected_in_one_line(tmp_path, arrange, message):
    (tmp_path / "val.csv").write_text("path,label\nb.mp4,x\n")
    arrange(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(root=str(tmp_path), **VIDEO)
    assert "\n" not in str(error.value)


def test_lists_without_a_header(tmp_path):
    (tmp_path / "val.csv").write_text("b.mp4 1\n")
    (tmp_path / "train.csv").write_text("some dir/b.mp4 2\na.mp4 0\n")  # as SlowFast writes them
    dataset = load(root=str(tmp_path), **VIDEO)
    assert dataset.class_names == ("0", "1", "2")
    assert [dataset.train_id(i) for i in range(2)] == ["a.mp4", "some dir/b.mp4"]  # sorted by path


def test_lists_with_a_byte_order_mark_and_other_columns(tmp_path):
    (tmp_path / "val.csv").write_text("b.mp4 1\n")
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbfLabel,Path\r\n2,a.mp4\r\n1,b.mp4\r\n")  # as Excel does
    assert load(root=str(tmp_path), **VIDEO).class_names == ("0", "1", "2")


def test_lists_of_parts_with_a_label_file(tmp_path):
    (tmp_path / "labels.txt").write_text("run\njump\n")
    rows = [{"path": "a.mp4", "label": "jump", "start": 1.5, "end": 3}, {"path": "a.mp4", "label": "run"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "val.csv").write_text("label,path\nrun,b.mp4\nrin,c.mp4\n")
    dataset = load(root=str(tmp_path), **VIDEO)
    assert dataset.class_names == ("run", "jump")
    assert [dataset.train_id(i) for i in range(2)] == ["a.mp4", "a.mp4#1.5-3"]
    (batch,) = take(dataset.test_batches(2), 1)
    assert not batch["mask"].any()
    assert [problem.reason for problem in batch["problems"]] == [
        "No such file or directory",
        "unknown label 'rin'. Did you mean 'run'?",
    ]
    (tmp_path / "val.csv").write_text("b.mp4 flying\n")
    errors = load(root=str(tmp_path), **VIDEO).survey().errors
    assert any("labels.txt lacks the class 'flying' of val: add the names" in line for line in errors)


@pytest.mark.parametrize(
    "names, classes",
    [
        (["01", "02", "10"], ("01", "02", "10")),  # leading zeros
        (["1990", "2000"], ("1990", "2000")),
        (["2", "10", "0", "1", "3", "4", "5", "6"], tuple(map(str, range(11)))),
    ],
)
def test_numeric_class_names_are_numbers_only_without_large_gaps(tmp_path, names, classes):
    for split in ("train", "val"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.mp4").write_bytes(b"")
    assert load(root=str(tmp_path), **VIDEO).class_names == classes


def test_thumbnails_links_hidden_files_and_undecodable_names(tmp_path, root):
    for split in ("train", "val"):
        shutil.copytree(root / "val", tmp_path / split)
    session = tmp_path / "train" / "up" / "session"
    session.mkdir()
    shutil.copy(root / "val" / "up" / "000.mp4", session / "one.mp4")
    Image.new("RGB", (8, 8)).save(session / "cover.jpg")
    (session / "circle").symlink_to(tmp_path / "train" / "up")
    (session / "._one.mp4").write_bytes(b"")
    strange = os.path.join(os.fsencode(session), b"caf\xe9\n.mp4")
    Path(os.fsdecode(strange)).write_bytes(b"no video")
    dataset = load(root=str(tmp_path), **VIDEO)
    ids = [dataset.train_id(i) for i in range(dataset.train_examples)]
    assert [i for i in ids if "session" in i] == [
        "train/up/session/caf\\xe9\\n.mp4",
        "train/up/session/one.mp4",
    ]
    (batch,) = take(dataset.train_batches(11, start_step=0), 1)
    assert [problem.id for problem in batch["problems"]] == ["train/up/session/caf\\xe9\\n.mp4"]
    assert batch["mask"].sum() == 10


def test_fixed_files_no_longer_count(tmp_path):
    problem = Problem("train/a.mp4", "empty file")
    with pytest.raises(UserError, match=r"fix or remove those in .*unreadable\.tsv, or raise this limit"):
        Unreadable(epath.Path(tmp_path), 10, 0.05).note("train", [problem])
    Unreadable(epath.Path(tmp_path), 10, 0.05).note("train", [])
    Unreadable(epath.Path(tmp_path), 10, 0.15).note("train", [problem])
    assert (tmp_path / "unreadable.tsv").read_text() == "train\ttrain/a.mp4\tempty file\n"


def test_notes_do_not_count_as_unreadable(tmp_path, capsys):
    """Replaced frames are reported once per file, short clips once with their number."""
    notes = [Problem(f"train/{n}.mp4", "fewer than the 8 frames of a clip", "short") for n in range(3)]
    repaired = Problem("train/3.mp4", "1 frame could not be decoded, replaced by the nearest", "repaired")
    unreadable = Unreadable(epath.Path(tmp_path), 4, 0.0)
    for _ in range(2):
        unreadable.note("train", [*notes, repaired])
        unreadable.note("train", notes)
        unreadable.exchange()
    assert capsys.readouterr().out.splitlines() == [
        f"note: train example train/3.mp4: {repaired.reason}",
        "note: train: 3 clips have fewer than the 8 frames of a clip; frames are repeated",
    ]
    assert (tmp_path / "unreadable.tsv").read_text() == f"train\ttrain/3.mp4\t{repaired.reason}\n"


def test_classes_in_another_order_are_matched_by_name(root):
    dataset = load(root=str(root), **VIDEO)
    (before,) = take(dataset.test_batches(9), 1)
    assert dataset.class_names == ("left", "right", "up")
    assert not dataset.adopt_classes(["left", "right", "up"])
    assert dataset.adopt_classes(["up", "left", "right"])
    (after,) = take(dataset.test_batches(9), 1)
    assert (after["labels"] == np.array([1, 2, 0])[before["labels"]]).all()
    assert dataset.class_names == ("up", "left", "right")
    with pytest.raises(UserError, match="lack 'down' and add 'right'"):
        dataset.adopt_classes(["up", "left", "down"])


TRAIN = [
    "--config=configs/folder.py",
    "--config.model.name=deit_tiny_struct_1_video",
    "--config.model.widths=(16,)",
    "--config.data.size=24",
    "--config.data.batch_size=8",
    "--config.train.duration=6 steps",
    "--config.optimizer.warmup=0 steps",
]


def test_bad_files_are_masked_listed_and_counted(root, command, tmp_path):
    """Training continues and reports each with its reason; evaluation reports how many are missing."""
    place, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(root, place)
    reasons = clips.write_bad(place / "train" / "up")
    rows = [(os.path.relpath(path, place), path.parent.name) for path in files(place)]
    rows += [("train/up/nowhere.mp4", "up"), ("train/up/000.mp4/inside.mp4", "up")]
    reasons |= {"nowhere.mp4": "No such file", "inside.mp4": "Not a directory"}
    write_csv(place / "listed.csv", rows)
    (place / "labels.txt").write_text("up\nleft\nright\n")
    (place / "val" / "up" / "broken.mp4").write_bytes(b"no video")
    arguments = [*TRAIN, f"--config.data.root={place}", "--config.data.train_split=listed.csv"]
    arguments += [f"--workdir={workdir}", "--config.train.duration=2 epochs"]

    stopped = command(*arguments)
    assert stopped.returncode == 2
    assert "max_unreadable_fraction" in stopped.stderr and len(stopped.stderr.splitlines()) == 1

    arguments += ["--config.data.max_unreadable_fraction=0.3"]
    process = command(*arguments, "--config.eval.every=4 steps")
    listed = [line.split("\t") for line in (workdir / "unreadable.tsv").read_text().splitlines()]
    found = {Path(name).name: reason for split, name, reason in listed if split == "train"}
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, found[name]), name
        assert f"{name} left out: " in process.stdout + stopped.stdout
    assert process.returncode == 2
    assert "cache: decoded frames are kept in memory" in process.stdout
    assert "no score: 1 of 10 test examples cannot be read (val/up/broken.mp4: Invalid data" in process.stderr
    assert "step 4  evaluation: no score" in process.stdout

    evaluated = command(
        *arguments, "--mode=eval", "--config.eval.max_unreadable=1", "--config.data.workers=2"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert (result["examples"], result["missing"]) == (9, 1)
    predictions = np.load(workdir / "predictions.npz")
    assert predictions["scores"].shape == (10, 3)
    assert predictions["ids"][predictions["labels"] < 0].tolist() == ["val/up/broken.mp4"]
    assert predictions["class_names"].tolist() == ["up", "left", "right"]
    top1 = (predictions["scores"].argmax(1) == predictions["labels"])[predictions["labels"] >= 0]
    assert result["top1"] == pytest.approx(top1.mean())

    (place / "labels.txt").write_text("left\nright\nup\n")  # another order: matched by name
    again = command(*arguments, "--mode=eval", "--config.eval.max_unreadable=1")
    assert "matched by name" in again.stdout
    assert json.loads((workdir / "result.json").read_text()) == result


def test_training_on_video_files_learns_motion(command, tmp_path):
    """Three classes of video files that single frames cannot distinguish, tested on 150 unseen files."""
    clips.write_folder(tmp_path / "data", {"train": 60, "val": 50})
    arguments = ["--config=configs/folder.py", f"--config.data.root={tmp_path / 'data'}"]
    arguments += ["--config.data.size=24", "--config.optimizer.lr=3e-3", "--config.optimizer.warmup=10 steps"]
    arguments += ["--config.eval.every=", "--config.checkpoint.every=", "--config.train.duration=100 steps"]
    arguments += [
        "--config.model.depths=(1,1,1,1)",
        "--config.model.widths=(16,16,32,32)",
        "--config.model.head_width=16",
    ]
    top1 = {}
    for frames in (8, 1):
        given = [*arguments, f"--config.data.frames={frames}", f"--workdir={tmp_path / str(frames)}"]
        process = command(*given)
        assert process.returncode == 0, process.stderr
        result = json.loads((tmp_path / str(frames) / "result.json").read_text())
        assert result["examples"] == 150
        top1[frames] = result["top1"]
    assert top1[8] >= 0.9 and top1[1] <= 0.4, top1
