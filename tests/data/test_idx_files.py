"""IDX files are read exactly, and damaged ones are refused in one line; garments move like digits."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
from clips import load, same, take
from conftest import structvit
from idx_writer import idx_bytes, write_split

from structvit_jax.data import idx_files
from structvit_jax.data.digits import MovingDigits
from structvit_jax.data.garments import GarmentMotions, MovingGarments
from structvit_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (60, 5, 7), np.uint8), np.arange(60, dtype=np.uint8) % 3
TEST_IMAGES, TEST_LABELS = IMAGES[:9, ::-1], LABELS[:9]


@pytest.fixture
def root(tmp_path):
    write_split(tmp_path, "train", IMAGES, LABELS)
    write_split(tmp_path, "t10k", TEST_IMAGES, TEST_LABELS, compressed=True)
    return tmp_path


def dataset(root, **changes):
    return load(name="folder", root=str(root), frames=0, **changes)


def pixels(source, number):
    media, label = source.open(number)
    return media.frames([0])[0], label


@pytest.mark.parametrize("test_split", ["val", "test", "t10k"])
def test_images_and_labels_are_those_of_the_files(root, test_split):
    found = dataset(root, test_split=test_split)
    for source, images, labels in (
        (found.train.source, IMAGES, LABELS),
        (found.test.source, TEST_IMAGES, TEST_LABELS),
    ):
        assert len(source) == len(images) and (source.labels == labels).all()
        for number in range(len(images)):
            picture, label = pixels(source, number)
            assert (picture == images[number][..., None]).all() and picture.shape[-1] == 3
            assert label == labels[number]
    assert found.class_names == ("0", "1", "2") and found.test_ids[8] == "t10k/8"
    assert found.unit == "images" and found.in_files


def test_survey_states_counts_and_digests(root):
    lines = "\n".join(dataset(root).survey().lines())
    assert "60 train + 9 val images, 3 classes of 20" in lines and "5 pixels" in lines
    for content in (idx_bytes(IMAGES), idx_bytes(LABELS), idx_bytes(TEST_IMAGES), idx_bytes(TEST_LABELS)):
        assert hashlib.sha256(content).hexdigest()[:16] in lines


def test_names_of_files_with_dots(tmp_path):
    write_split(tmp_path, "train", IMAGES, LABELS, dot=".")
    write_split(tmp_path, "t10k", TEST_IMAGES, TEST_LABELS, dot=".")
    assert len(dataset(tmp_path).train.source) == 60


def test_batches_do_not_depend_on_workers(root):
    streams = (dataset(root, workers=n, size=8).train_batches(4, start_step=0) for n in (0, 2))
    for threads, processes in zip(*(take(stream, 3) for stream in streams), strict=True):
        assert same(threads, processes)


def test_class_names(root, monkeypatch):
    monkeypatch.setitem(idx_files._CLASSES, hashlib.sha256(idx_bytes(LABELS)).hexdigest(), ("a", "b", "c"))
    assert dataset(root).class_names == ("a", "b", "c")
    (root / "labels.txt").write_text("x\ny\nz\n")
    assert dataset(root).class_names == ("x", "y", "z")
    (root / "labels.txt").write_text("x\ny\n")
    with pytest.raises(UserError, match=r"labels\.txt has 2 names, but the labels go up to 2"):
        dataset(root)


def test_published_classes_of_fashion_mnist():
    (names,) = idx_files._CLASSES.values()
    assert len(names) == 10 and names[0] == "T-shirt/top" and names[9] == "Ankle boot"


@pytest.mark.parametrize(("changes", "count"), [({"test_split": "tune"}, 5), ({"val_fraction": 0.2}, 12)])
def test_held_out_images(root, changes, count):
    """They are the same in every run, and no longer in the training split."""
    if "val_fraction" in changes:
        for kind in ("images-idx3", "labels-idx1"):
            (root / f"t10k-{kind}-ubyte.gz").unlink()
    splits = [(found.train.source, found.test.source) for found in (dataset(root, **changes),) * 2]
    train, held = splits[0]
    ids = {train.id(i) for i in range(len(train))}, {held.id(i) for i in range(len(held))}
    assert len(held) == count and len(train) == 60 - count
    assert ids[0].isdisjoint(ids[1]) and len(ids[0] | ids[1]) == 60
    for source in splits[0]:
        for number in range(len(source)):
            picture, label = pixels(source, number)
            original = int(source.id(number).removeprefix("train/"))
            assert (picture == IMAGES[original][..., None]).all() and label == LABELS[original]
    assert (
        train.made_from
        != held.made_from
        != dataset(root, val_fraction=0.1, test_split="train").train.source.made_from
    )
    assert splits[1][1].made_from == held.made_from


def test_emnist(tmp_path):
    """Two data sets in one folder; images are stored transposed; labels start at 1; a mapping names them."""
    for name in ("emnist-letters", "emnist-digits"):
        write_split(tmp_path, f"{name}-train", IMAGES, LABELS + 1, compressed=True)
        write_split(tmp_path, f"{name}-test", TEST_IMAGES, TEST_LABELS + 1, compressed=True)
        (tmp_path / f"{name}-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n")
    with pytest.raises(UserError, match="train_split=emnist-digits-train or emnist-letters-train"):
        dataset(tmp_path)
    found = dataset(tmp_path, train_split="emnist-letters-train")
    assert found.class_names == ("Aa", "Bb", "Cc") and found.test_ids[0] == "emnist-letters-test/0"
    picture, label = pixels(found.train.source, 4)
    assert label == 1 and (picture[..., 0] == IMAGES[4].T).all()
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65\n2 66\n")
    with pytest.raises(UserError, match=r"emnist-letters-mapping\.txt lacks the label 3"):
        dataset(tmp_path, train_split="emnist-letters-train")
    (tmp_path / "emnist-letters-mapping.txt").write_text("one A\n")
    with pytest.raises(UserError, match="not a list of labels and codes"):
        dataset(tmp_path, train_split="emnist-letters-train")


GOOD = idx_bytes(IMAGES)
DAMAGE = {
    "cut off": (GOOD[:-1], "cut off: it"),
    "longer": (GOOD + b"x", "more than 2,100 of 2,100 values"),
    "header only": (GOOD[:10], "not an IDX file of bytes with 3 axes"),
    "floats": (b"\0\0\x0d\3" + GOOD[4:], "not an IDX file of bytes with 3 axes"),
    "labels": (idx_bytes(LABELS), "not an IDX file of bytes with 3 axes"),
    "huge": (GOOD[:4] + b"\xff" * 4 + GOOD[8:], "cut off: it should have"),
    "huge pixels": (GOOD[:8] + b"\xff" * 8 + GOOD[16:], "max_pixels"),
    "empty": (b"", "empty file"),
    "fewer": (idx_bytes(IMAGES[:50]), "50 images with 60 labels"),
    "text": (b"<html>not found</html>", "not an IDX file"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(root, damage, compressed):
    content, message = DAMAGE[damage]
    if compressed:
        (root / "train-images-idx3-ubyte").unlink()
        if damage not in ("empty", "text"):
            content = gzip.compress(content)
        message = {"text": "Not a gzipped file", "empty": "empty file"}.get(damage, message)
    (root / f"train-images-idx3-ubyte{'.gz' * compressed}").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        dataset(root)
    assert "\n" not in str(error.value) and "train" in str(error.value)


def test_damaged_compression(root):
    (root / "train-images-idx3-ubyte").unlink()
    content = gzip.compress(GOOD)
    for damaged in (content[:-20], content[:100] + bytes(50) + content[150:]):
        (root / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: .*; download it again"):
            dataset(root)


def test_missing_files(root):
    (root / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"test_split\) 't10k'\. Known: train"):
        dataset(root)
    (root / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="not the file of labels, train-labels-idx1-ubyte"):
        dataset(root, test_split="tune")


def test_label_of_the_test_split_is_no_class(root):
    write_split(root, "t10k", TEST_IMAGES, TEST_LABELS + 1)
    with pytest.raises(UserError, match="t10k: label 3 is not a class of train"):
        dataset(root)


def test_prepare(root, capsys):
    assert structvit("prepare", "folder", root, "--check") == 0
    printed = capsys.readouterr().out
    assert "69 of 69 examples can be read" in printed
    assert f"next: structvit train --config=folder --config.data.root={root}" in printed
    with pytest.raises(UserError, match="replace --out by --check"):
        structvit("prepare", "folder", root, f"--out={root}/lists")


@pytest.mark.parametrize("source", [MovingGarments, GarmentMotions])
def test_garments_move_like_digits(root, source):
    train, again, test, tune = (
        source(str(root), split, 20, seed=1) for split in ("train", "train", "test", "tune")
    )
    clip, label = train.open(3)
    assert clip.frames(range(8)).shape == (8, 32, 32, 3) and label == 3
    assert (pickle.loads(pickle.dumps(again)).open(3)[0].frames(range(8)) == clip.frames(range(8))).all()
    assert len(train._sprites) == len(tune._sprites) == 60 and len(test._sprites) == 9
    assert hashlib.sha256(idx_bytes(IMAGES)).hexdigest()[:16] in train.made_from
    assert train.class_names[:8] == MovingDigits.class_names


def test_garments_keep_their_mean_grey(root):
    sprites = MovingGarments(str(root), "train", 1, seed=0)._sprites
    assert sprites.shape == (60, 16, 16) and sprites.dtype == np.float32
    assert MovingGarments(str(root), "test", 1, seed=0)._sprites.max() <= 1
    large = np.full((1, 28, 28), 51, np.uint8)
    write_split(root, "train", large, LABELS[:1])
    assert MovingGarments(str(root), "train", 1, seed=0)._sprites == pytest.approx(0.2, abs=1e-6)


def test_garments_need_a_folder():
    with pytest.raises(
        UserError, match=r"moving_garments: set --config\.data\.root to a folder of IDX files"
    ):
        load(name="moving_garments", train_examples=8, test_examples=8)
