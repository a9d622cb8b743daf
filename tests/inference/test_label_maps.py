"""Folders of label maps: interrupted, of another teacher, given by mistake, damaged."""

import numpy as np
import pytest

from structvit_jax.data.label_maps import LabelMaps, LabelMapWriter, check_destination, digest
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

IDS, NAMES, SHAPE = [f"image {i}" for i in range(8)], ["a", "b", "c"], (8, 2, 2, 2)
CARD = {"teacher": "runs/a", "params_sha256": "1", "class_names": NAMES, "images": 8, "ids": digest(IDS)}


def write(folder, images, finish=False, **card):
    writer = LabelMapWriter(str(folder), CARD | card, SHAPE)
    start = writer.done
    for image in range(start, images):
        writer.write(image, np.full((1, 2, 2, 2), image % 3), np.full((1, 2, 2, 2), 0.25))
    if finish:
        writer.finish()
    return start


def test_unfinished_maps_resume_with_the_same_teacher_alone(tmp_path):
    folder = tmp_path / "maps"
    assert write(folder, 3) == 0
    for card, differs in (
        ({"params_sha256": "2", "teacher": "runs/b"}, "other params_sha256"),
        ({"ids": digest(IDS[::-1])}, "other ids"),
        ({"class_names": NAMES[::-1]}, "other class_names"),
    ):
        with pytest.raises(UserError, match=f"unfinished label maps of runs/a with {differs}; remove"):
            write(folder, 8, **card)
    with pytest.raises(UserError, match="no finished label maps"):
        LabelMaps(str(folder), IDS, NAMES)
    assert write(folder, 8, finish=True, teacher="moved/a") == 3
    classes, scores = LabelMaps(str(folder), IDS, NAMES[::-1]).read(7)
    assert (classes == 1).all() and (scores == 0.25).all()
    with pytest.raises(UserError, match="holds finished label maps"):
        write(folder, 8)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for refuse in (lambda: check_destination(str(tmp_path)), lambda: write(tmp_path, 1)):
        with pytest.raises(UserError, match="holds other files"):
            refuse()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_destination(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    check_destination(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.npy", b""),
        ("scores.npy", b"garbage"),
        ("scores.npy", None),
        ("maps.json", b"[]"),
        ("maps.json", b"\xff"),
        ("maps.json", b"{}"),
    ],
)
def test_damaged_maps_are_refused_in_a_line(tmp_path, name, content):
    write(tmp_path / "maps", 8, finish=True)
    path = tmp_path / "maps" / name
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=str(tmp_path)):
        LabelMaps(str(tmp_path / "maps"), IDS, NAMES)


def test_a_class_without_a_name_makes_one_example_unreadable(tmp_path):
    write(tmp_path, 8, finish=True)
    array = np.load(tmp_path / "classes.npy", mmap_mode="r+")
    array[2] = 9
    array.flush()
    maps = LabelMaps(str(tmp_path), IDS, NAMES)
    maps.read(1)
    with pytest.raises(DecodeError, match="label map is damaged"):
        maps.read(2)
