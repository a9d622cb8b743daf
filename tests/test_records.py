"""Shards and TFDS image sets: the same batches as from files, read without tensorflow."""

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
from conftest import ROOT
from etils import epath
from PIL import Image

from structvit_jax.data import index, records, shards
from structvit_jax.errors import DecodeError, UserError

VIDEO = {"name": "folder", "size": 24, "frames": 5, "augment__crop_area": (0.5, 1.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Clips of every kind, parts of files, frames, damage, a missing file and an unknown label."""
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
    shards.main([str(root), str(out), "--train_split=some", "--shards=3", *options])
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
    assert len(batches[0][0]["problems"]) >= 8  # of the two that are cut off, parts may be read
    assert batches[0][0]["mask"].sum() + len(batches[0][0]["problems"]) == count
    tests = [take(d.test_batches(6), 1)[0] for d in (plain, sharded)]
    assert same(*tests)
    with pytest.raises(UserError, match="holds shards already"):
        shards.main([str(root), str(out), "--train_split=some"])


def stopped():
    raise InterruptedError


def test_shards_that_were_killed_are_written_again(root, tmp_path, monkeypatch):
    """Even when all is written but the list of ids."""
    out = tmp_path / "out"
    arguments = [str(root), str(out), "--train_split=some"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a kill cleans nothing up
        patch.setattr(index.Index, "id", lambda self, number: stopped())
        with pytest.raises(InterruptedError):
            shards.main(arguments)
    assert records.find_shards(str(out)) is None
    shards.main(arguments)
    assert [path.name for path in out.iterdir()] == ["clips"]
    dataset = load(**VIDEO, root=str(out), train_split="some")
    assert dataset.train.source.id(0) == "long.mp4#0-1.5"


def test_copying_to_a_bucket(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("d")
    records.copy_tree(epath.Path(tmp_path / "a"), epath.Path(tmp_path / "e"))
    assert (tmp_path / "e" / "b" / "c").read_text() == "d"


class DigitPictures(tfds.core.GeneratorBasedBuilder):
    """The scans as PNG, as a TFDS data set."""

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
    assert "no split 'tst' but test, train" in wrong.stderr.replace("train, test", "test, train")


@pytest.mark.parametrize("name", ["no_such_set", "imagenet2012", "cifar10"])
def test_a_tfds_set_that_is_not_there_says_what_to_install(tmp_path, name):
    with pytest.raises(UserError, match=f"tfds build {name}.*pip install tensorflow") as error:
        load(name=f"tfds:{name}", frames=0, root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_help_and_mistakes_of_the_command(tmp_path):
    command = [sys.executable, "-m", "structvit_jax.data.shards"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    wrong = subprocess.run(
        [*command, "nowhere", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stderr == "error: no folder 'nowhere'\n"
