"""The command `structvit convert`."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import structvit
from convert_helpers import tiny
from PIL import Image

from structvit_jax import convert, create_model, data
from structvit_jax.models import weights
from structvit_jax.training import evaluation
from structvit_jax.training.card import from_card
from structvit_jax.training.restore import adopt_classes, open_checkpoint
from structvit_jax.utils.errors import UserError


def test_labels_name_the_classes(tmp_path):
    path, labels = str(tmp_path / "released.safetensors"), tmp_path / "labels.txt"
    convert.weight_files.write(path, tiny("uniformer_tiny", 10))
    labels.write_bytes("\ufeffa\r\nb \n\n".encode() + "".join(f"class {i}\n" for i in range(8)).encode())
    named, again = (str(tmp_path / name) for name in ("named.safetensors", "again.pth"))
    structvit("convert", path, named, "--data=imagenet", f"--labels={labels}")
    structvit("convert", named, again)  # without an option
    names = convert.read_released(again).class_names
    assert names is not None and names[:3] == ("a", "b", "class 0")
    for content, phrase in [
        (b"a\nb\n", "labels.txt does not fit .*: there are 2 class names for 10 classes"),
        (b"a\n" * 10, "'a' occurs more than once"),
        (b"\xff\xfea", "labels.txt is not UTF-8 text"),
    ]:
        labels.write_bytes(content)
        with pytest.raises(UserError, match=phrase):
            structvit("convert", named, str(tmp_path / "x.pth"), f"--labels={labels}")
    with pytest.raises(UserError, match="cannot read --labels"):
        structvit("convert", named, str(tmp_path / "x.pth"), f"--labels={tmp_path}")
    for taken in (named, "/dev/null"):  # refused before the source is opened
        with pytest.raises(UserError, match="already exists"):
            structvit("convert", str(tmp_path / "nothing.pth"), taken)


def test_a_released_head_scores_on_prepared_data(tmp_path, capsys):
    """Each class is one colour that the head recognises; the outputs are in the released order."""
    names = list(convert.RELEASED["something"].class_names())
    colours = np.random.default_rng(0).permutation(np.stack(np.mgrid[:6, :6, :6], -1).reshape(-1, 3) * 51)
    labels = [f'"{name}"' if "," in name else name for name in reversed(names)]
    stem = tmp_path / "something-something-v1"
    Path(f"{stem}-labels.csv").write_text("".join(f"{label}\n" for label in labels))
    rows = "".join(f"{number};{label}\n" for number, label in enumerate(labels))
    for split in ("train", "validation"):
        Path(f"{stem}-{split}.csv").write_text(rows)
    for number in range(174):
        folder = tmp_path / "frames" / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), tuple(map(int, colours[number]))).save(folder / "00001.png")
    frames, out = str(tmp_path / "frames"), str(tmp_path / "lists")
    assert structvit("prepare", "something_v1", str(tmp_path), frames, "--out", out) == 0

    model = create_model("uniformer_tiny_video", num_classes=174)
    pixels = np.broadcast_to(colours[:174, None, None, None, ::-1], (174, 2, 32, 32, 3))
    features = np.asarray(model.pooled(((pixels / 255 - 0.45) / 0.225).astype(np.float32)))[::-1]
    centre, scale = features.mean(0), 1e4 / features.std()
    features = scale * (features - centre)  # the nearest class by squared distance
    params, stats = weights.split(model)[1]
    params["head.kernel"] = (scale * features).T
    params["head.bias"] = -scale * features @ centre - (features**2).sum(1) / 2
    path, folder = str(tmp_path / "released.safetensors"), tmp_path / "converted"
    convert.weight_files.write(
        path, convert.to_torch({n: np.asarray(a) for n, a in (params | stats).items()})
    )
    structvit("convert", path, str(folder))
    assert "class names: those of Something-Something" in capsys.readouterr().out

    with open_checkpoint(str(folder)) as (checkpoints, step):
        config = from_card(checkpoints.card(step)["config"], "card")
    config.data.update(root=out, size=32, short_side=0, frames=2, test_clips=1, test_crops=1, workers=0)
    config.eval.batch_size = 88
    evaluation.evaluate_checkpoint(config, folder, tmp_path / "out", data.load(config.data, config.augment))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["top1"] == 1
    card = checkpoints.card(step) | {"class_names": None}
    with pytest.raises(UserError, match="the checkpoint does not name its classes"):
        adopt_classes(data.load(config.data, config.augment), card)
