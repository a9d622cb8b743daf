"""The survey of a data set before training, automatic settings, and the fingerprints of data."""

import collections
import json
import os
import re
import shutil

import clips
import numpy as np
import pytest
from clips import load
from conftest import ROOT, structvit
from PIL import Image

from structvit_jax import data
from structvit_jax.config import automatic, check_config, steps_in
from structvit_jax.data import pipeline
from structvit_jax.data.fingerprint import compare
from structvit_jax.data.folder import Layout, hold_out, is_video
from structvit_jax.data.index import Entry, read_labels
from structvit_jax.utils.errors import UserError

IMAGES = {"name": "folder", "size": 16, "frames": 0}


def write_images(root, splits, size=(8, 8), ending=".png", seed=0):
    """ROOT/SPLIT/CLASS/NUMBER.png; `splits` is {split: {class: images}}."""
    rng = np.random.default_rng(seed)
    for split, classes in splits.items():
        for label, count in classes.items():
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number:03}{ending}", "PNG")
    return root


def survey(root, **changes):
    return load(root=str(root), **IMAGES, **changes).survey()


def test_examples_and_ignored_files_are_counted(tmp_path):
    """Empty classes, other kinds of files and sizes, in a table and in a few lines."""
    write_images(tmp_path, {"train": {"a": 4, "b": 3}, "val": {"a": 1, "b": 1}}, (10, 20))
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "\x1b[31m").mkdir()
    for name in ("a/x.odd", "a/y.odd", "a/noend", "a/clip.mp4", "c/z.odd", "a/.hidden"):
        (tmp_path / "train" / name).write_bytes(b"?")
    found = survey(tmp_path)
    train, val = found.splits
    assert (len(train.source), len(val.source), found.unit) == (7, 2, "images")
    assert train.classes == {"a": 4, "b": 3}
    assert train.range_text("width") == "20" and train.range_text("height") == "10" and not found.errors
    assert "\x1b" not in found.table() + "".join(found.lines())
    assert found.lines() == [
        "data: 7 train + 2 val images, 2 classes of 3 to 4 (median 4); 20 x 10 pixels",
        f"note: {tmp_path}/train has class folders without examples: \\x1b[31m, c",
        f"note: {tmp_path}/train: 7 examples; ignored: .odd (3), no extension (1), videos (1)",
    ]
    table = found.table()
    for row in (
        r"examples +7 +2",
        r"classes +2 +2",
        r"  a +4 +1",
        r"decoded +7 of 7 +2 of 2",
        r"width.* 20 +20",
    ):
        assert re.search(f"^{row}$", table, re.MULTILINE), (row, table)


def test_a_table_of_many_classes_stays_short(tmp_path):
    write_images(
        tmp_path, {split: {f"class {i:02}": 1 + i % 2 for i in range(40)} for split in ("train", "val")}
    )
    lines = survey(tmp_path).table().splitlines()
    assert len([line for line in lines if line.startswith("  class")]) == 15
    assert any("and 25 more" in line for line in lines) and lines[2].split() == ["classes", "40", "40"]


@pytest.mark.parametrize(
    "train, val, error, warning",
    [
        ({"a": 2, "b": 2}, {"a": 1, "b": 1, "c": 1}, "val has the class 'c', which train lacks", ""),
        ({"a": 2, "b": 2, "c": 2}, {"a": 1, "b": 1}, "", "val has no example of the class 'c'"),
        ({"a": 2}, {"a": 1}, "all examples of train have the class 'a'", ""),
        (
            {"a": 40, "b": 2},
            {"a": 1, "b": 1},
            "",
            "the largest class of train has 40 examples, the smallest 2",
        ),
    ],
)
def test_classes_that_one_split_lacks(tmp_path, train, val, error, warning):
    found = survey(write_images(tmp_path, {"train": train, "val": val}))
    for expected, lines in ((error, found.errors), (warning, found.warnings)):
        assert len(lines) == bool(expected) and all(line.startswith(expected) for line in lines), lines
    if error:
        with pytest.raises(UserError, match=error):
            found.check()


def test_a_class_missing_from_the_label_file_stops_training(tmp_path, refused):
    """Before anything is compiled, with a did-you-mean suggestion."""
    write_images(tmp_path, {split: {"cat": 2, "dog": 2, "owl": 2} for split in ("train", "val")})
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nowls\r\n")
    line = refused(OWN, f"--config.data.root={tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert "labels.txt lacks the class 'owl' of train: add the names" in line and "mean 'owls'" in line
    assert "and 1 more: structvit show --data lists them" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\xff\n", "save it as UTF-8"),
        (b"a\nb\na\n", "has the name 'a' more than once"),
        (None, "cannot be read"),
    ],
)
def test_unusable_label_files_are_rejected(tmp_path, content, message, monkeypatch):
    path = tmp_path / "labels.txt"
    path.write_bytes(content or b"a\n")
    if content is None:  # root ignores permissions

        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=message):
        read_labels(str(tmp_path))


def test_labels_of_many_digits(tmp_path):
    """Python does not convert more than 4,300 digits to a number."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"path,label\na.png,{'9' * 5000}\nb.png,1\n")
    assert load(root=str(tmp_path), **IMAGES).class_names == ("1", "9" * 5000)


def test_duplicates_between_splits_are_a_warning(tmp_path):
    write_images(tmp_path, {"train": {"a": 30, "b": 30}, "val": {"a": 5, "b": 5}})
    assert not survey(tmp_path).warnings
    shutil.copy(tmp_path / "train" / "a" / "007.png", tmp_path / "val" / "b" / "x.png")
    (warning,) = survey(tmp_path).warnings
    assert "1 of 11 examples of val seem to be copies of examples of train" in warning
    assert "val/b/x.png and train/a/007.png" in warning
    same = load(root=str(tmp_path), **IMAGES, train_split="val")  # using one split for both is intended
    assert not same.survey().warnings


def test_unreadable_examples_are_counted(tmp_path):
    write_images(tmp_path, {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}})
    (tmp_path / "train" / "a" / "000.png").write_bytes(b"?")
    found = survey(tmp_path)
    assert "1 of 6 decoded examples of train cannot be read (train/a/000.png: " in found.warnings[0]
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"?")
    (error,) = survey(tmp_path).errors
    assert error.startswith("none of 2 examples of val can be read (val/a/000.png: ")


def test_short_videos_and_lengths(tmp_path):
    clips.write_folder(tmp_path, {"train": 1, "val": 1})
    found = load(root=str(tmp_path), name="folder", size=24, frames=32).survey()
    assert "3 of 3 decoded videos are shorter than the 32 frames of a clip" in found.warnings[0]
    assert re.search(r"^length, frames +16 +16$", found.table(), re.MULTILINE)


def test_built_in_data(tmp_path):
    found = load(name="digits", frames=0).survey()
    assert found.splits[0].classes["3"] > 100 and not found.errors + found.warnings
    assert "200 of 1,437" in found.table()
    assert "8 classes" in load(train_examples=8, test_examples=8).survey().lines()[0]


def test_holding_out_is_deterministic_and_stratified():
    entries = [
        Entry(f"train/{label}/{i:03}.png", label) for label, n in (("a", 30), ("b", 4)) for i in range(n)
    ]
    left, held = hold_out(entries, 0.1)
    assert collections.Counter(entry.label for entry in held) == {"a": 3, "b": 1}
    assert sorted([*left, *held]) == sorted(entries)
    assert [entry.path for entry in held] == HELD  # on every machine
    assert hold_out(reversed(entries), 0.1) == (left, held)
    encoded = [entry._replace(path=entry.path.replace(".png", ".jpg")) for entry in entries]
    assert [e.path[:-4] for e in hold_out(encoded, 0.1)[1]] == [e.path[:-4] for e in held]


def test_holding_out_keeps_one_example_and_the_parts_of_a_file_together():
    assert hold_out([Entry("a.png", "a")], 0.5) == ([Entry("a.png", "a")], [])
    parts = [Entry("long.mp4", "a", start, start + 1) for start in range(9)] + [Entry("x.mp4", "a", 0, 1)]
    assert {entry.path for entry in hold_out(parts, 0.5)[1]} in ({"long.mp4"}, {"x.mp4"})


HELD = ["train/a/001.png", "train/a/023.png", "train/a/026.png", "train/b/001.png"]


def test_class_folders_alone_are_a_training_split(tmp_path):
    """Without val_fraction the error suggests it."""
    write_images(tmp_path, {".": {"a": 10, "b": 10, "c": 10}})
    with pytest.raises(
        UserError,
        match=r"\(it has: a, b, c\).*, or hold out training examples with --config.data.val_fraction=0.1",
    ):
        survey(tmp_path)
    dataset = load(root=str(tmp_path), **IMAGES, val_fraction=0.1)
    assert (dataset.train_examples, dataset.test_examples) == (27, 3)
    assert sorted(name[0] for name in dataset.test_ids) == ["a", "b", "c"]
    assert f"{tmp_path} has no split 'val': 3 of 30 training examples" in dataset.survey().lines()[1]


def test_a_missing_test_split_is_held_out(tmp_path):
    """Another split is suggested instead; folders named as splits are not classes."""
    root = write_images(tmp_path / "data", {"train": {"a": 10, "b": 10}, "test": {"c": 10}})
    with pytest.raises(UserError, match=r"neither a folder 'val' nor a list.*or hold out training examples"):
        survey(root)
    found = survey(root, val_fraction=0.2)
    assert len(found.splits[1].source) == 4
    assert found.notes[0].endswith("; to use test instead: --config.data.test_split=test")
    other = write_images(tmp_path / "other", {"valid": {"a": 1}, "test": {"a": 1}})
    with pytest.raises(UserError, match="neither a folder 'train'"):
        survey(other, val_fraction=0.2)


def test_the_kind_is_that_of_most_examples(tmp_path):
    """Folders of numbered frames are videos, other folders of images are not."""

    def touch(root, *names):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        return Layout(str(root), val_fraction=0.1)

    assert is_video(touch(tmp_path / "1", "train/a/1.mp4", "train/a/1.jpg", "train/b/2.mp4", "train/b/2.jpg"))
    assert not is_video(touch(tmp_path / "2", "train/a/1.mp4", "train/a/1.jpg", "train/b/2.jpg"))
    assert is_video(touch(tmp_path / "3", *(f"train/a/clip/frame_{i:03}.jpg" for i in range(1, 5))))
    assert not is_video(touch(tmp_path / "4", *(f"train/a/day/IMG_{i}.jpg" for i in range(4031, 4035))))
    assert not is_video(touch(tmp_path / "5", *(f"a/{i}.jpg" for i in range(9))))
    listed = touch(tmp_path / "6", "train.csv")
    (tmp_path / "6" / "train.csv").write_text("some.jpg a\nother.jpg b\nlast.mp4 b\n")
    assert not is_video(listed)
    with pytest.raises(UserError, match=r"no images or videos in it; ignored: .odd \(1\)"):
        is_video(touch(tmp_path / "7", "train/a/x.odd"))
    images = write_images(tmp_path / "8", {"train": {"a": 2}, "val": {"a": 2}})
    with pytest.raises(UserError, match="has no videos, but 2 images: choose a model for images"):
        load(root=str(images), name="folder")


# Automatic settings.

OWN = "--config=configs/folder.py"


def own(argument="", **given):
    """Return configs/folder.py with values as from the command line."""
    namespace: dict = {}
    exec((ROOT / "configs" / "folder.py").read_text(), namespace)
    config = namespace["get_config"](*([argument] if argument else []))
    for key, value in given.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config.copy_and_resolve_references()


def filled(config, video, *facts):
    automatic.fill_model(config, lambda: video)
    automatic.fill(config, automatic.DataFacts(*facts))
    check_config(config)
    assert not automatic.missing(config)
    return automatic.describe(config, automatic.DataFacts(*facts))


def test_automatic_settings():
    images = own()
    assert filled(images, False, 60_000, 10_000, 28, 28, 1) == (
        "images: 60,000 + 10,000 of 28x28: structvit_tiny_4_1 at 32, batch 128, 14,062 steps"
    )
    assert images.train.duration == "1800000 examples" and images.data.short_side == 48
    assert images.optimizer.warmup == "703 steps" and images.checkpoint.every == "469 steps"
    assert images.eval.every == "2344 steps" and images.optimizer.lr == 3e-3
    assert images.augment.crop_area == (0.7, 1.0)
    videos = own()
    assert filled(videos, True, 200, 30, 640, 360, 300) == (
        "videos: 200 + 30 of 300 frames of 640x360: structvit_tiny_4_1_video at 8 frames of 64, batch 16,"
        " 750 steps"
    )
    assert videos.data.short_side == 96
    assert videos.augment.crop_area == (0.5, 1.0) and videos.augment.flip == 0
    assert "at 8 frames of 32, batch 16, 10,000 steps" in filled(own(), True, 10**6, 9, 32, 40, 9)


def test_automatic_settings_of_larger_models_and_tight_crops():
    tight = own(data__crop_fraction=0.25)
    filled(tight, True, 200, 30, 640, 360, 300)
    assert tight.data.short_side == 256
    for model, side in (("structvit_s_4_1_video", 256), ("structvit_s_4_1", 0)):
        large = own(model)
        filled(large, False, 200, 30, 640, 360, 300)
        assert (large.data.size, large.data.short_side) == (224, side)
        assert large.optimizer.lr == 1e-3
    photos = own("structvit_s_4_1")
    filled(photos, False, 200, 30, 4000, 3000, 1)
    assert (photos.data.size, photos.data.short_side) == (224, 336)


def test_given_settings_are_kept():
    config = own(train__duration="2 steps", data__size=48, data__batch_size=4)
    assert "structvit_tiny_4_1 at 48, batch 4, 2 steps" in filled(config, False, 9, 3, 500, 400, 1)
    assert config.optimizer.warmup == "0 steps" and config.eval.every == ""
    assert "structvit_s_4_1 at 224" in filled(own("structvit_s_4_1"), True, 9000, 3, 500, 400, 1)
    assert "structvit_s_4_1 at 32" in filled(own("structvit_s_4_1"), True, 9000, 3, 28, 28, 1)
    assert "deit_tiny_video at 4 frames of 24" in filled(
        own("deit_tiny_video", data__frames=4), False, 99, 3, 500, 400, 1
    )
    assert "structvit_tiny_4_1_video at 1 frames" in filled(own(data__frames=1), False, 99, 3, 50, 40, 1)
    tuned = own("structvit_s_4_1_video,finetune")
    assert "at 16 frames of 224, batch 16, 8,750 steps" in filled(tuned, False, 7_000, 3, 300, 300, 99)
    assert tuned.train.duration == "140000 examples" and tuned.optimizer.lr == 1e-4  # 20 epochs


@pytest.mark.parametrize("examples", [1, 2, 7, 39, 300, 10**4, 10**6, 10**7])
@pytest.mark.parametrize(("video", "least", "most"), [(True, 12_000, 160_000), (False, 50_000, 2_000_000)])
def test_default_runs_are_bounded(examples, video, least, most):
    config = own()
    filled(config, video, examples, 1, 100, 100, 9)
    total = steps_in(config.train.duration, "", config.data.batch_size, examples)
    seen = total * config.data.batch_size
    assert seen == pytest.approx(min(max(30 * examples, least), most), abs=config.data.batch_size)
    assert steps_in(config.optimizer.warmup, "", config.data.batch_size, examples) == total // 20
    assert 1 <= config.data.batch_size <= max(2, examples)


# Fingerprints.


def changes_between(*roots, **changes):
    """Return how the fingerprints of some roots differ from that of the first."""
    every = [load(root=str(root), **IMAGES, **changes).fingerprint for root in roots]
    return [compare(every[0], one) for one in every]


def test_fingerprints_do_not_depend_on_storage(tmp_path):
    """In another folder, as lists with absolute paths, and as shards."""
    root = write_images(tmp_path / "data", {"train": {"a": 9, "b": 9}, "val": {"a": 2, "b": 2}})
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "data")
    structvit("prepare", "folder", str(root), "--out", str(tmp_path / "lists"))
    structvit("prepare", "shards", str(root), str(tmp_path / "shards"), "--images")
    assert not data.is_video(own(data__root=str(tmp_path / "shards")).data)
    for changes in changes_between(root, moved, tmp_path / "lists", tmp_path / "shards"):
        assert changes.same and changes.alike == changes.sampled == 22
    assert json.loads(json.dumps(load(root=str(root), **IMAGES).fingerprint))["test"]["examples"] == 4


def test_changed_data_are_described(tmp_path):
    root = write_images(tmp_path / "data", {"train": {"a": 9, "b": 9}, "val": {"a": 2, "b": 2}})
    other = write_images(tmp_path / "other", {"train": {"a": 9, "b": 9}, "val": {"a": 2, "b": 2}}, seed=1)
    fewer = shutil.copytree(root, tmp_path / "fewer")
    (fewer / "train" / "a" / "000.png").unlink()
    labelled = shutil.copytree(root, tmp_path / "labelled")
    os.rename(labelled / "val" / "a" / "000.png", labelled / "val" / "b" / "009.png")
    found = changes_between(root, other, fewer, labelled)
    assert [changes.described for changes in found] == [
        "",
        "train: 0 of 18 sampled examples are the same; test: 0 of 4 sampled examples are the same",
        "train: 17 examples instead of 18, 17 of 18 sampled examples are the same",
        "test: examples with other names, 2 of 4 sampled examples are the same",
    ]
    lists = tmp_path / "lists"
    structvit("prepare", "folder", str(root), "--out", str(lists))
    before = load(root=str(lists), **IMAGES).fingerprint
    text = (lists / "train.jsonl").read_text().replace('"a"', '"b"', 1)
    (lists / "train.jsonl").write_text(text)
    changes = compare(before, load(root=str(lists), **IMAGES).fingerprint)
    assert changes.described == "train: other labels, 17 of 18 sampled examples are the same"
    made = [load(train_examples=n, test_examples=8).fingerprint for n in (8, 16)]
    assert " (16 examples) instead of moving_digits" in compare(*made).described
    assert compare(made[0], made[0]).same


def test_a_workdir_belongs_to_one_data_set(command, tmp_path):
    """Other data are rejected, fixed files are not; an evaluation on other data has its own result."""
    root = write_images(tmp_path / "data", {"train": {"a": 9, "b": 9}, "val": {"a": 2, "b": 2}})
    other = write_images(tmp_path / "other", {"train": {"a": 9, "b": 9}, "val": {"a": 2, "b": 2}}, seed=1)
    (root / "train" / "a" / "000.png").write_bytes(b"?")
    workdir = tmp_path / "run"

    def run(place, *arguments, steps=2):
        given = [
            OWN,
            "--config.model.name=deit_tiny",
            "--config.model.widths=(16,)",
            "--config.model.depths=(1,)",
            "--config.data.workers=0",
        ]
        given += [f"--config.train.duration={steps} steps", "--config.data.max_unreadable_fraction=0.5"]
        return command(*given, f"--config.data.root={place}", f"--workdir={workdir}", *arguments)

    first = run(root)
    assert first.returncode == 0, first.stderr
    assert "images: 18 + 4 of 8x8: deit_tiny at 24, batch 16, 2 steps" in first.stdout
    assert "warning: 1 of 18 decoded examples of train cannot be read" in first.stdout
    result = (workdir / "result.json").read_bytes()
    again = run(shutil.copytree(root, tmp_path / "moved"))
    assert "the run is complete" in again.stdout, again.stderr
    for steps in (2, 3):
        swapped = run(other, steps=steps)
        assert swapped.returncode == 2 and "result" not in swapped.stdout
        assert "other data (train: " in swapped.stderr and "choose another --workdir" in swapped.stderr
    shutil.copy(other / "train" / "a" / "000.png", root / "train" / "a" / "000.png")
    assert "18 sampled examples are the same" in run(root).stderr  # after completion any difference counts
    longer = run(root, steps=3)
    assert longer.returncode == 0, longer.stderr
    assert "note: the data have changed (train: 17 of 18 sampled examples are the same)" in longer.stdout
    result = (workdir / "result.json").read_bytes()
    assert run(other, "--mode=eval", steps=3).returncode == 0
    assert (workdir / "result.json").read_bytes() == result and (workdir / "result_other.json").exists()
    (workdir / "result.json").unlink()
    assert run(tmp_path / "moved", "--mode=eval", steps=3).returncode == 0  # the same test data
    assert (workdir / "result.json").read_bytes() == result


def forbid_workers():
    """In a command: fail if it starts data workers."""
    pipeline.in_processes = None


def test_show_prints_a_table_and_errors_and_draws_a_batch(command, tmp_path):
    def show(root, workdir):
        given = [OWN, "--data", f"--config.data.root={root}", f"--workdir={workdir}"]
        return command(*given, program="show", first=forbid_workers)

    root = write_images(tmp_path / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}}, (28, 28))
    shown = show(root, tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    assert "decoded" in shown.stdout and "structvit_tiny_4_1 at 32" in shown.stdout
    assert (tmp_path / "run" / "batch.png").exists()
    shutil.rmtree(root / "train" / "b")
    refused = show(root, tmp_path / "other")
    assert refused.returncode == 2 and refused.stdout.count("\nerror: ") == 2, refused.stdout
    blocked = show(root, "/dev/null/run")
    assert blocked.returncode == 2 and len(blocked.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("folder", "{data}", "--out", "{file}"), ("shards", "{data}", "{file}/x", "--images")]
)
def test_unwritable_outputs_are_reported(tmp_path, arguments):
    root = write_images(tmp_path / "data", {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}})
    file = tmp_path / "file"
    file.write_bytes(b"")
    given = [word.format(data=root, file=file) for word in arguments]
    with pytest.raises(UserError, match=f"{file}.* cannot be written"):
        structvit("prepare", *given)


def test_changed_annotation_files_are_reported(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("label,youtube_id,time_start,time_end\nyoga,abc,soon,9\n")
    with pytest.raises(UserError, match=r"kinetics400: the annotations in .* are not as distributed"):
        structvit("prepare", "kinetics400", str(tmp_path), "--out", str(tmp_path / "out"))
