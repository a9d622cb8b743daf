"""Small copies of the official annotation files, and the check of every file."""

import json
import shutil
from pathlib import Path

import clips
import pytest
from clips import load
from conftest import structvit
from deadly import Deadly
from PIL import Image

from structvit_jax.data import preparation
from structvit_jax.data.index import read_list
from structvit_jax.utils.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def touch(root, *names):
    for name in names:
        write(root / name, "")


def lists(out):
    entries = {split: list(read_list(str(out / f"{split}.jsonl"))) for split in ("train", "val")}
    return {
        split: [(Path(e.path).name, e.label, e.start, e.end) for e in rows] for split, rows in entries.items()
    }


def run(*arguments):
    return structvit("prepare", *arguments)


def test_kinetics400(tmp_path, capsys):
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    write(
        tmp_path / "csv" / "train.csv",
        header + "air drumming,-0abcdefghi,12,22,train,0\nyoga,gone_video_,1,11,train,0\n",
    )
    write(tmp_path / "csv" / "validate.csv", header + '"stretching, arm",ABCDEFGHIJK,5,15,validate,0\n')
    touch(tmp_path / "videos", "train/air drumming/-0abcdefghi_000012_000022.mp4", "val/ABCDEFGHIJK.mkv")
    assert run("kinetics400", tmp_path / "csv", tmp_path / "videos", "--out", tmp_path / "out") == 0
    assert lists(tmp_path / "out") == {
        "train": [("-0abcdefghi_000012_000022.mp4", "air drumming", None, None)],
        "val": [("ABCDEFGHIJK.mkv", "stretching, arm", None, None)],
    }
    labels = (tmp_path / "out" / "labels.txt").read_text().splitlines()
    assert labels == ["air drumming", "stretching, arm", "yoga"]
    assert (tmp_path / "out" / "missing-train.txt").read_text() == "gone_video__000001_000011\n"
    out = capsys.readouterr().out
    assert "train: 1 examples, published 240,436 (0.0%), 1 more are annotated" in out
    dataset = load(name="folder", root=str(tmp_path / "out"))
    assert (dataset.train_examples, dataset.test_examples, dataset.class_names) == (1, 1, tuple(labels))


def test_something_v1(tmp_path):
    stem = "something-something-v1"
    write(tmp_path / "a" / f"{stem}-labels.csv", "Holding something\nTurning something upside down\n")
    write(tmp_path / "a" / f"{stem}-train.csv", "7;Turning something upside down\n8;Holding something\n")
    write(tmp_path / "a" / f"{stem}-validation.csv", "9;Holding something\n")
    for name in ("7", "8", "9"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        Image.new("RGB", (20, 16)).save(tmp_path / "frames" / name / "00001.jpg")
    assert run("something_v1", tmp_path / "a", tmp_path / "frames", "--out", tmp_path / "out", "--check") == 0
    assert lists(tmp_path / "out") == {
        "train": [("7", "Turning something upside down", None, None), ("8", "Holding something", None, None)],
        "val": [("9", "Holding something", None, None)],
    }
    assert load(name="folder", root=str(tmp_path / "out")).class_names[1] == "Turning something upside down"


def test_something_v2(tmp_path):
    stem = "something-something-v2"
    write(
        tmp_path / f"{stem}-labels.json",
        {"Pushing something": "1", "Approaching something with your camera": "0"},
    )
    row = {
        "id": "78687",
        "label": "pushing a cup",
        "template": "Pushing [something]",
        "placeholders": ["a cup"],
    }
    write(tmp_path / f"{stem}-train.json", [row])
    write(tmp_path / f"{stem}-validation.json", [row | {"id": "5"}])
    touch(tmp_path / "videos", "78687.webm", "5.webm")
    assert run("something_v2", tmp_path, tmp_path / "videos", "--out", tmp_path / "out") == 0
    assert lists(tmp_path / "out")["train"] == [("78687.webm", "Pushing something", None, None)]
    names = (tmp_path / "out" / "labels.txt").read_text().splitlines()
    assert names == ["Approaching something with your camera", "Pushing something"]


def test_diving48(tmp_path):
    write(
        tmp_path / "Diving48_vocab.json",
        [["Back", "15som", "05Twis", "FREE"], ["Inward", "Dive", "NoTwis", "PIKE"]],
    )
    row = {"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 136}
    write(tmp_path / "Diving48_V2_train.json", [row])
    write(tmp_path / "Diving48_V2_test.json", [row | {"vid_name": "x_00001", "label": 0}])
    touch(tmp_path / "rgb", "_8Vy3dlHg2w_00000.mp4", "x_00001.mp4")
    assert run("diving48", tmp_path, tmp_path / "rgb", "--out", tmp_path / "out") == 0
    assert lists(tmp_path / "out") == {
        "train": [("_8Vy3dlHg2w_00000.mp4", "Inward / Dive / NoTwis / PIKE", None, None)],
        "val": [("x_00001.mp4", "Back / 15som / 05Twis / FREE", None, None)],
    }


@pytest.mark.parametrize("classes", [99, 288])
def test_finegym(tmp_path, classes):
    lines = [f"Clabel: {n:3}; set:  1; Glabel: {n + 1:3}; (VT) element {n % 98}, off" for n in range(classes)]
    write(tmp_path / f"gym{classes}_categories.txt", "\n".join(lines) + "\n")
    segments = {"A_0003_0005": {"stages": 1, "timestamps": [[3.48, 5.0]]}}
    segments["A_0009_0014"] = {"stages": 2, "timestamps": [[9.5, 11.0], [11.0, 13.75]]}
    event = {"event": 1, "segments": segments, "timestamps": [[2407.32, 2435.28]]}
    write(tmp_path / "finegym_annotation_info_v1.1.json", {"0LtLS9_OrkE": {"E_002407_002435": event}})
    prefix = "0LtLS9_OrkE_E_002407_002435"
    write(
        tmp_path / f"gym{classes}_train_element_v1.1.txt", f"{prefix}_A_0003_0005 7\n{prefix}_A_0009_0014 0\n"
    )
    write(tmp_path / f"gym{classes}_val_element.txt", f"{prefix}_A_0003_0005 98\n")
    touch(tmp_path / "videos", "0LtLS9_OrkE.mp4")
    assert run(f"finegym{classes}", tmp_path, tmp_path / "videos", "--out", tmp_path / "out") == 0
    found = lists(tmp_path / "out")
    for split, label, start, end in [
        ("train", f"(VT) element 7, off{' [7]' * (classes > 105)}", 2410.8, 2412.32),
        ("train", "(VT) element 0, off [0]", 2416.82, 2421.07),
        ("val", "(VT) element 0, off [98]", 2410.8, 2412.32),
    ]:
        assert ("0LtLS9_OrkE.mp4", label, pytest.approx(start), pytest.approx(end)) in found[split]
    assert len(load(name="folder", root=str(tmp_path / "out")).class_names) == classes
    write(tmp_path / f"gym{classes}_val_element.txt", f"{prefix}_A_0001_0002 98\n")
    with pytest.raises(UserError, match=r"val_element\.txt:1: the annotations have no clip"):
        run(f"finegym{classes}", tmp_path, tmp_path / "videos", "--out", tmp_path / "out")


@pytest.mark.parametrize("flat", [True, False])
def test_imagenet(tmp_path, flat):
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    touch(
        tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC",
        "train/n01/n01_9.xml",
        "val/ILSVRC2012_val_00000001.xml",
    )
    touch(data, "train/n02/n02_1.JPEG", "train/n01/n01_9.JPEG", "train/n01/n01_10.JPEG")
    if flat:
        touch(data, "val/ILSVRC2012_val_00000001.JPEG")
        solution = "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4 \n"
        write(tmp_path / "LOC_val_solution.csv", solution)
    else:
        touch(data, "val/n02/ILSVRC2012_val_00000001.JPEG")
    assert run("imagenet", tmp_path, "--out", tmp_path / "out") == 0
    assert lists(tmp_path / "out")["val"] == [("ILSVRC2012_val_00000001.JPEG", "n02", None, None)]
    dataset = load(name="folder", root=str(tmp_path / "out"), frames=0)
    assert (dataset.train_examples, dataset.class_names) == (3, ("n01", "n02"))


def test_lists_from_a_folder(tmp_path):
    for split in ("train", "val"):
        for number in range(12):
            touch(tmp_path / "data", f"{split}/{number}/a.mp4")
    assert run("folder", tmp_path / "data", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "labels.txt").read_text().split() == [str(n) for n in range(12)]
    assert load(name="folder", root=str(tmp_path / "out")).class_names == tuple(map(str, range(12)))
    with pytest.raises(UserError, match="holds the data themselves"):
        run("folder", tmp_path / "data", "--out", tmp_path / "data")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of 9 videos; reports go to `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    clips.write_folder(tmp_path / "data", {"train": 2, "val": 1})
    return tmp_path / "data"


def check(root):
    return run("folder", root, "--check", "--workers", 1)


def test_check_lists_every_bad_file(root, tmp_path, capsys):
    assert check(root) == 0
    assert "9 of 9 examples can be read" in capsys.readouterr().out
    reasons = clips.write_bad(root / "train" / "up")
    assert check(root) == 1
    out = capsys.readouterr().out
    (report,) = tmp_path.glob("bad_files-data-*.txt")
    found = dict(line.split("\t")[1:] for line in report.read_text().splitlines())
    assert {Path(name).name for name in found} == reasons.keys()
    assert "cut off" in found["train/up/cut.webm"]
    for name, reason in found.items():
        assert f"train {name}: {reason}" in out
    assert "9 of 17 examples can be read" in out


def test_check_of_lists(root, tmp_path, capsys):
    (root / "listed.csv").write_text(
        "path,label\ntrain/up/000.mp4,up\ngone.mp4,up\ntrain/up/000.mp4/x.mp4,up\n"
    )
    assert run("list", root / "listed.csv", "--check", "--out", tmp_path / "out") == 1
    assert "listed gone.mp4: No such file" in capsys.readouterr().out
    (root / "listed.csv").write_text("path,label\n")
    with pytest.raises(UserError, match="is empty"):
        run("list", root / "listed.csv", "--check")


def test_check_of_a_list_with_other_class_names(root, capsys):
    (root / "listed.csv").write_text("path,label\ntrain/up/000.mp4,up\n")
    (root / "labels.txt").write_text("left\nright\n")
    assert run("list", root / "listed.csv", "--check") == 1
    assert "labels.txt lacks the class 'up' of listed: add the names" in capsys.readouterr().out


def test_check_reports_unknown_labels(root, tmp_path, capsys):
    (root / "val" / "upp").mkdir()
    clips.write_video(root / "val" / "upp" / "9.mp4", clips.pictures("up", 9))
    assert check(root) == 1
    out = capsys.readouterr().out
    assert "error: val has the class 'upp', which train lacks" in out and "Did you mean 'up'?" in out
    (report,) = tmp_path.glob("bad_files-data-*.txt")
    assert "val/upp/9.mp4\tunknown label 'upp'" in report.read_text() and "next: " not in out


def test_a_clean_check_removes_the_report_of_the_same_data_only(root, tmp_path):
    bad = root / "train" / "up" / "empty.mp4"
    bad.write_bytes(b"")
    assert check(root) == 1
    (report,) = tmp_path.glob("bad_files-data-*.txt")
    other = tmp_path / "other" / "data"
    for split in ("train", "val"):
        shutil.copytree(root / "val", other / split)
    assert check(other) == 0
    assert report.exists()
    bad.unlink()
    (root / "test").mkdir()
    (root / "test" / "unlabelled.mp4").write_bytes(b"")
    (root / "train.tar.gz").write_bytes(b"")
    assert check(root) == 0
    assert not report.exists()


def test_a_file_that_kills_its_decoder_is_reported(tmp_path, capsys):
    assert preparation.check({"train": Deadly()}, 2, str(tmp_path / "bad_files.txt")) == 1
    assert (tmp_path / "bad_files.txt").read_text() == "train\tfile 2\tkills the process that decodes it\n"
    assert "4 of 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("kinetics", "a", "b", "--check"), "'kinetics'. Did you mean 'kinetics400'"),
        (("folder", "nowhere", "--check"), "no folder 'nowhere'"),
        (("folder", ".", "--train_split=", "--check"), "--train_split is empty"),
        (("list", "nowhere.csv", "--check"), "no list 'nowhere.csv'"),
        (("folder", "."), "nothing to do"),
        (("folder", ".", "--check"), "has neither a folder 'train' nor a list"),
        (("folder", ".", "--check", "--val_fraction", "1"), "--val_fraction.*not in the range"),
        (("folder", ".", "--check", "--workers", "0"), "--workers.*not in the range"),
        (("kinetics400", ".", ".", "--check"), "has no file train.csv or kinetics"),
    ],
)
def test_user_errors_name_the_problem(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*arguments)
