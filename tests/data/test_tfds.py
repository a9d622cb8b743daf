"""Shards and TFDS image sets: equal batches as from files, read without tensorflow."""

import io
import json
import os
import shutil
import subprocess
import sys

import clips
import numpy as np
import pytest
import tensorflow_datasets as tfds
from clips import load, same, take
from conftest import ROOT, structvit
from etils import epath
from PIL import Image

from structvit_jax.data import tfds_writer
from structvit_jax.data.dataset import find_shards
from structvit_jax.data.index import Entry, Index
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

VIDEO = {"name": "folder", "size": 24, "frames": 5, "augment__crop_area": (0.5, 1.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Clips of every kind, parts of files, frames, damaged and missing files, and an unknown label."""
    root = tmp_path_factory.mktemp("clips")
    clips.write_folder(root, {"train": 7, "val": 2})
    clips.write_bad(root / "train" / "up")
    frames = root / "train" / "left" / "frames"
    frames.mkdir()
    for number, picture in enumerate(clips.pictures("left", 99)):
        Image.fromarray(picture).save(frames / f"{number}.png")
    rows = [{"path": str(p.relative_to(root)), "label": p.parent.name} for p in (root / "train").rglob("*.*")]
    rows = [row for row in rows if "/frames/" not in row["path"]]
    rows += [{"path": "train/left/frames", "label": "left"}, {"path": "train/gone.mp4", "label": "up"}]
    long = root / "long.mp4"
    film = np.concatenate([clips.pictures("right", number) for number in range(8)])
    clips.write_video(long, film, "rotated", g="12")
    for start in (0.0, 1.3, 4.0, 6.5, 30.0):
        rows.append({"path": "long.mp4", "label": "right", "start": start, "end": start + 1.5})
    rows += [{"path": "train/up/cut.webm", "label": "up", "start": 0.2, "end": 3.0}]
    (root / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "labels.txt").write_text("left\nright\nup\n")
    with (root / "some.jsonl").open("a") as file:
        file.write('\n{"path": "train/up/000.mp4", "label": "sideways"}\n')
    return root


@pytest.mark.parametrize("runner", ["", "DirectRunner"])
def test_shards_give_the_same_batches(root, tmp_path, runner, capfd):
    out = tmp_path / "out"
    options = [f"--beam_runner={runner}"] if runner else []
    structvit("prepare", "shards", str(root), str(out), "--train_split=some", "--shards=3", *options)
    plain = load(**VIDEO, root=str(root), train_split="some")
    sharded = load(**VIDEO, root=str(out), train_split="some")
    assert sharded.class_names == plain.class_names
    assert len(list((out / "clips" / "1.0.0").glob("clips-some.array_record-*"))) == 3
    assert sharded.test_ids == plain.test_ids
    ids = [[d.train.source.id(i) for i in range(d.train_examples)] for d in (plain, sharded)]
    assert ids[0] == ids[1]
    count = plain.train_examples
    batches = [take(d.train_batches(count, start_step=0), 2) for d in (plain, sharded)]
    for a, b in zip(*batches, strict=True):
        assert same(a, b)
    assert len(batches[0][0]["problems"]) >= 8  # two truncated files may be partly readable
    assert batches[0][0]["mask"].sum() + len(batches[0][0]["problems"]) == count
    tests = [take(d.test_batches(6), 1)[0] for d in (plain, sharded)]
    assert same(*tests)
    with pytest.raises(UserError, match="holds shards already"):
        structvit("prepare", "shards", str(root), str(out), "--train_split=some")


@pytest.fixture
def written(tmp_path):
    """Shards of a few clips."""
    clips.write_folder(tmp_path / "files", {"train": 1, "val": 1})
    structvit("prepare", "shards", str(tmp_path / "files"), str(tmp_path / "out"))
    return tmp_path / "out"


def test_a_flipped_bit_is_one_unreadable_example(written):
    (shard,) = (written / "clips" / "1.0.0").glob("clips-train.array_record-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    dataset = load(**VIDEO, root=str(written))
    (batch,) = take(dataset.train_batches(3, start_step=0), 1)
    assert 1 <= len(batch["problems"]) <= 3
    assert batch["mask"].sum() == 3 - len(batch["problems"])


def test_invalid_values_in_a_record_are_rejected(written):
    source = load(**VIDEO, root=str(written)).train.source
    record = source._records[0]
    for changes, reason in (
        ({"label": 3}, "label 3, but there are 3 classes"),
        ({"label": -1}, "label -1, but there are 3 classes"),
        ({"first": -1, "count": 4}, "frames -1 to 3 of a file of 16 frames"),
        ({"first": 10, "count": 7}, "frames 10 to 17 of a file of 16 frames"),
        ({"first": 0, "count": 2**40, "missing": 2**40 - 1}, "1099511627776 frames, more than"),
        ({"first": 0, "count": 4, "missing": -1}, "frames 0 to 5 of a file of 16 frames"),
        ({"files": []}, "out of range"),
        ({"kind": b"pictures", "files": [b"#!/bin/sh"]}, "not an image"),
    ):
        source.__dict__["_records"] = [record | changes]
        with pytest.raises(DecodeError, match=reason):
            source.open(0)[0].frames([0])
    source.__dict__["_records"] = [record | {"first": 3, "count": 9, "missing": 2}]
    assert source.open(0)[0].count == 9


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("features.json", {"pythonClassName": "evil.Feature", "featuresDict": {"features": {}}}),
        ("features.json", {"type": "evil.Feature", "content": {}}),
        ("features.json", {"featuresDict": {"features": {"a": {"python_class_name": "evil.Feature"}}}}),
        ("dataset_info.json", {"features": {"pythonClassName": "evil.Feature"}}),
    ],
)
def test_foreign_feature_classes_are_not_imported(written, monkeypatch, name, description):
    folder = written / "clips" / "1.0.0"
    (written / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(written))
    known = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(known | description))
    with pytest.raises(UserError, match=rf"{name} names 'evil\.Feature', which is not a feature") as error:
        load(**VIDEO, root=str(written))
    assert "\n" not in str(error.value)
    (written / "image_set" / "1.0.0").mkdir(parents=True)
    for file in ("features.json", "dataset_info.json"):
        (folder / file).rename(written / "image_set" / "1.0.0" / file)
    with pytest.raises(UserError, match=rf"{name} names 'evil\.Feature'"):
        load(name="tfds:image_set", frames=0, root=str(written))


def test_damaged_shards_are_rejected_in_one_line(written):
    folder = written / "clips" / "1.0.0"
    ids, info = folder / "ids-train.txt", folder / "dataset_info.json"
    text = ids.read_text()
    for content in (text + "one more\n", ""):
        ids.write_text(content)
        with pytest.raises(UserError, match=r"ids-train\.txt has . lines for 3 examples; write it again"):
            load(**VIDEO, root=str(written))
    ids.unlink()
    with pytest.raises(UserError, match=r"ids-train\.txt cannot be read"):
        load(**VIDEO, root=str(written))
    ids.write_text(text)
    for content in ("[" * 100_000, '{"name"', '{"name": "clips", "version": 3}', "\0"):
        info.write_text(content)
        with pytest.raises(UserError, match=r"cannot be read|has no shards that can be read") as error:
            load(**VIDEO, root=str(written))
        assert "\n" not in str(error.value)


def test_pipes_are_not_read_into_shards(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    record = tfds_writer.record(Index(str(tmp_path), [Entry("pipe.jpg", "a")], ("a",)), 0)
    assert record["problem"] == "not a regular file" and not record["files"]


def test_interrupted_shards_are_written_again(root, tmp_path, monkeypatch):
    """Also if only the list of ids is missing."""
    out = tmp_path / "out"
    arguments = [str(root), str(out), "--train_split=some"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a kill cleans up nothing
        patch.setattr(Index, "ids", lambda self: sys.exit())
        with pytest.raises(SystemExit):
            structvit("prepare", "shards", *arguments)
    assert find_shards(str(out)) is None
    structvit("prepare", "shards", *arguments)
    assert [path.name for path in out.iterdir()] == ["clips"]
    dataset = load(**VIDEO, root=str(out), train_split="some")
    assert dataset.train.source.id(0) == "long.mp4#0-1.5"


class DigitPictures(tfds.core.GeneratorBasedBuilder):
    """The scans as PNG in a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._examples(slice(1437)), "test": self._examples(slice(1437, None))}

    def _examples(self, part):
        from sklearn.datasets import load_digits

        scans = load_digits()
        for number, (scan, label) in enumerate(zip(scans.images[part], scans.target[part], strict=True)):
            png = io.BytesIO()
            Image.fromarray(np.uint8(scan * 15.9)).save(png, "PNG")
            png.seek(0)
            yield number, {"image": png, "label": int(label)}

    def _generate_examples(self):
        raise NotImplementedError


def test_a_tfds_image_set_trains_without_tensorflow(tmp_path, command):
    with pytest.raises(ModuleNotFoundError):
        import tensorflow  # noqa: F401

    DigitPictures(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    arguments = ["--config=configs/digits.py", "--config.data.name=tfds:digit_pictures"]
    arguments += [f"--config.data.root={tmp_path}", "--config.data.test_split=test", "--config.eval.every="]
    arguments += ["--config.train.duration=60 steps", "--config.optimizer.warmup=6 steps"]
    arguments += ["--config.model.depths=(1,1,1,1)", "--config.model.widths=(16,16,32,32)"]
    arguments += ["--config.model.head_width=16", "--config.data.batch_size=32"]
    process = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["examples"] == 360 and result["top1"] > 0.5, result

    part = load(
        name="tfds:digit_pictures", frames=0, root=str(tmp_path), train_split="train[:10%]", test_split="test"
    )
    assert (part.train_examples, part.test_examples) == (144, 360)
    part.test.source.__dict__["_records"] = [{"image": b"", "label": -1}]
    with pytest.raises(DecodeError, match="has no label"):
        part.test.source.open(0)

    wrong = command(*arguments[:3], "--config.data.test_split=tst")
    assert "no split 'tst', only test, train" in wrong.stderr.replace("train, test", "test, train")


@pytest.mark.parametrize("name", ["no_such_set", "imagenet2012", "cifar10"])
def test_a_missing_tfds_set_is_reported_with_the_command_that_prepares_it(tmp_path, name):
    with pytest.raises(UserError, match=f"tfds build {name}.*pip install tensorflow") as error:
        load(name=f"tfds:{name}", frames=0, root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_command_rejects_a_missing_folder(tmp_path):
    command = [sys.executable, "-m", "structvit_jax", "prepare", "shards"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    wrong = subprocess.run(
        [*command, "nowhere", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stderr == "error: no folder 'nowhere'\n"
