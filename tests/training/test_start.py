"""Initial weights of runs: fine-tuning, conversion, token labels, and the inputs that weights expect."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import COMPILER, QUICK, ROOT, SAME, Command, structvit
from small import SHORT, SMALL

from structvit_jax import convert, create_model
from structvit_jax.models import weights
from structvit_jax.runtime.mesh import make_mesh
from structvit_jax.training.restore import open_checkpoint
from structvit_jax.utils.errors import UserError

NOISE = "--config.data.name=noise:4"
OWN = "--config=configs/folder.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Return the workdir of a DeiT with plain attention, trained on ten classes at 24 pixels."""
    folder = tmp_path_factory.mktemp("digits")
    arguments = [
        "--config=configs/digits.py",
        "--config.model.name=deit_tiny",
        "--config.data.size=24",
        *SHORT,
    ]
    process = Command(folder, *arguments, f"--workdir={folder / 'run'}").wait()
    assert process.returncode == 0, process.stderr
    return folder / "run"


def test_fine_tuning(digits, command, tmp_path):
    """Plain attention to D = 4 with other classes, then to D = 8 at 32 pixels; and images to video."""

    def tune(name, *arguments):
        process = command(*arguments, *SHORT, f"--workdir={tmp_path / name}")
        assert process.returncode == 0, process.stderr
        return process.stdout

    output = tune(
        "classes",
        f"{OWN}:deit_tiny_struct_4,finetune",
        NOISE,
        "--config.data.size=24",
        f"--config.init_from={digits}",
    )
    for phrase in (
        "fine-tuning: starting at step 0 from the deit_tiny in",
        "carried over: ",
        "structure kernels that start as plain attention: 4 arrays",
        "re-initialised, for 4 classes instead of 10: 2 arrays, 132 values: head.bias, head.kernel",
    ):
        assert phrase in output, output
    data = json.loads((tmp_path / "classes" / "config.json").read_text())["data"]
    assert data["mean"] == [0.3] * 3 and data["std"] == [0.32] * 3 and data["channels"] == "rgb"

    moved = [NOISE, "--config.data.size=24", f"--config.init_from={tmp_path / 'gone'}"]
    output = tune("classes", f"{OWN}:deit_tiny_struct_4,finetune", *moved)
    # The normalisation comes from the run's own checkpoint.
    assert "the run is complete" in output and "config.data.mean" not in output

    larger = [
        NOISE,
        "--config.data.size=32",
        "--config.model.image_size=32",
        f"--config.init_from={tmp_path / 'classes'}",
    ]
    output = tune("larger", f"{OWN}:deit_tiny_struct_8,finetune", *larger)
    assert "structure kernels repeated, 4 to 8: 4 arrays" in output
    assert "positions resized: 1 array, 512 values: pos_embed" in output
    assert "re-initialised" not in output

    video = ["--config=configs/moving_digits.py", "--config.model.name=deit_tiny_struct_2_video"]
    output = tune("video", *video, f"--config.init_from={digits}")
    for phrase in (
        "inflated in time, by average: 1 array",
        "start as plain attention: 4 arrays",
        "re-initialised, for 8 classes instead of 10",
        "note: config.data.mean is (0.08, 0.08, 0.08); the weights were trained with (0.3, 0.3, 0.3)",
    ):
        assert phrase in output, output

    assert "the run is complete: step 2 of 2" in tune("video", *video, f"--config.init_from={digits}")
    shorter = command(*video, *SHORT, "--config.train.duration=1 steps", f"--workdir={tmp_path / 'video'}")
    assert "already past the last step" in shorter.stdout


def test_evaluating_a_checkpoint_without_its_run(digits, refused, tmp_path):
    moved = shutil.copytree(digits / "checkpoints" / "2", tmp_path / "moved" / "checkpoints" / "2")
    changed = ["--config.data.test_crops=1", "--config.data.workers=1"]
    words = [sys.executable, "-m", "structvit_jax", "evaluate", moved, f"--out={tmp_path / 'out'}", *changed]
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and "leaked" not in process.stderr, process.stderr
    assert (tmp_path / "out" / "result.json").read_bytes() == (digits / "result.json").read_bytes()
    module = {"program": "evaluate"}
    assert "Did you mean config.data.test_crops or" in refused(moved, "--config.data.test_crop=3", **module)
    assert "no checkpoint at" in refused(tmp_path / "none", **module)


def test_token_labelling_from_teacher_to_student(digits, command, tmp_path):
    """A teacher writes label maps of digits, is interrupted and resumed, and a student trains on them."""
    maps = tmp_path / "maps"
    images = 1437
    smaller = ["--config.eval.batch_size=64", "--top=3"]
    write = functools.partial(command, digits, maps, *smaller, program="prepare label_maps")
    process = write()
    assert process.returncode == 0, process.stderr
    assert "maps of 1437 images, 3x3 positions, 3 classes at each position" in process.stdout
    scores, classes = (np.load(maps / f"{name}.npy") for name in ("scores", "classes"))
    assert scores.shape == classes.shape == (images, 3, 3, 3)
    assert (
        (np.diff(scores, axis=-1) <= 0).all()
        and (scores.sum(-1) > 0).all()
        and (scores.sum(-1) <= 1.001).all()
    )

    (maps / "maps.json").rename(maps / "unfinished.json")
    damaged = np.lib.format.open_memmap(maps / "scores.npy", "r+")
    damaged[images // 2 :] = 0
    damaged.flush()
    process = write()
    assert process.returncode == 0, process.stderr
    assert np.array_equal(np.load(maps / "scores.npy"), scores)
    process = write()
    assert process.returncode == 2 and "holds finished label maps" in process.stderr

    student = ["--config=configs/digits.py", "--config.model.name=structvit_tiny_2_1", *SHORT, *SMALL]
    labelled = [
        f"--config.data.label_maps={maps}",
        "--config.augment.mix_token=1",
        f"--workdir={tmp_path / 'student'}",
    ]
    process = command(*student, *labelled)
    assert process.returncode == 2 and "set --config.model.token_labels=true as well" in process.stderr
    labelled.append("--config.model.token_labels=True")
    process = command(*student, *labelled, "--config.augment.mixup=0.8")
    assert process.returncode == 2 and "mixup and cutmix do not mix maps" in process.stderr
    card = (maps / "maps.json").read_text()
    (maps / "maps.json").write_text(re.sub('"ids": "..', '"ids": "', card))
    process = command(*student, *labelled)
    assert process.returncode == 2 and "of 1437 images that are not the 1437 of" in process.stderr
    (maps / "maps.json").write_text(card)
    process = command(*student, *labelled)
    assert process.returncode == 0, process.stderr
    assert "result: top1" in process.stdout
    with open_checkpoint(str(tmp_path / "student")) as (checkpoints, step):
        arrays, _ = checkpoints.whole(step, make_mesh(1, 1, jax.devices()[:1]))
    assert np.abs(arrays["aux_head.bias"]).max() > 0  # the dense head has learned


def test_the_convert_command(tmp_path, command, capsys):
    """A released file becomes a checkpoint of a StructViT; both are exported to PyTorch again."""
    model = create_model("uniformer_tiny_video", num_classes=174, seed=1)
    params, stats = weights.split(model)[1]
    released = convert.to_torch({name: np.asarray(array) for name, array in (params | stats).items()})
    path, folder = tmp_path / "released.safetensors", tmp_path / "converted"
    convert.weight_files.write(str(path), released)
    structvit("convert", str(path), str(folder), "--model=structvit_tiny_4_1_video")
    out = capsys.readouterr().out
    for phrase in (
        "uniformer_tiny_video, 174 classes",
        "bgr",
        "start as plain attention: 6 arrays",
        "written:",
    ):
        assert phrase in out
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["channels"] == "bgr" and config["data"]["sampling"] == "segment"

    back = tmp_path / "back.pth"
    structvit("convert", str(path), str(back))
    returned = convert.weight_files.read(str(back))
    assert returned.key == "model" and returned.arrays.keys() == released.keys()
    assert all(np.array_equal(returned.arrays[key], value) for key, value in released.items())
    other = tmp_path / "structvit.safetensors"
    structvit("convert", folder, other)
    again = convert.read_released(str(other))
    assert again.model["name"] == "structvit_tiny_4_1_video" and again.inputs.channels == "bgr"
    with open_checkpoint(str(folder)) as (checkpoints, step):
        arrays, _ = checkpoints.whole(step, make_mesh(1, 1, jax.devices()[:1]))
        assert checkpoints.card(step)["class_names"] == list(convert.RELEASED["something"].class_names())
    assert all(np.array_equal(again.arrays[name], array) for name, array in arrays.items())

    for arguments, phrase in [
        ([path, folder], "already exists"),
        ([folder, tmp_path / "x", "--data=k400"], "is not a file of PyTorch weights"),
        ([path, tmp_path / "x", "--model=uniformer_tiny"], "holds a video model"),
        ([path, tmp_path / "x", "--model=structvit_s_4_1_video"], "a different network from the model"),
    ]:
        with pytest.raises(UserError, match=phrase):
            structvit("convert", *arguments)
    video = [
        "--config=configs/moving_digits.py",
        "--config.data.train_examples=40",
        "--config.data.batch_size=8",
    ]
    process = command(*video, "--config.model.name=structvit_tiny_4_1_video", f"--workdir={folder}")
    assert process.returncode == 2 and "--config.init_from=" in process.stderr, process.stderr


def test_a_run_with_muon_and_averaged_weights_resumes_exactly(command, tmp_path):
    """The average is saved and evaluated, and other runs start from it."""
    averaged = [*QUICK, "--config.model.depths=(1,)", "--config.optimizer.ema=0.9"]
    averaged += ["--config.optimizer.name=muon"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*averaged, f"--workdir={whole}").returncode == 0
    first = Command(tmp_path, *averaged, f"--workdir={killed}")
    first.when(lambda: list((killed / "checkpoints").glob("6")))
    first.signal(signal.SIGKILL)
    first.wait()
    resumed = command(*averaged, f"--workdir={killed}")
    assert "resuming from" in resumed.stdout, resumed.stderr
    for name in SAME:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    with open_checkpoint(str(whole)) as (checkpoints, step):
        mesh = make_mesh(1, 1, jax.devices()[:1])
        arrays, is_average = checkpoints.whole(step, mesh)
        assert is_average and checkpoints.has(step, "average")
    result = json.loads((whole / "result.json").read_text())
    stats = {name: a for name, a in arrays.items() if name.endswith((".mean", ".var"))}
    rest = {name: a for name, a in arrays.items() if name not in stats}
    assert weights.sha256(weights.Weights(rest, stats)) == result["params_sha256"]
    plain = command(*averaged, "--mode=eval", "--config.eval.ema=False", f"--workdir={whole}")
    assert plain.returncode == 0 and result["params_sha256"][:12] not in plain.stdout

    for change in ("freeze=patch_embed.*", "name=adamw"):
        other = f"--config.optimizer.{change}"
        refused = command(*averaged, other, "--config.train.duration=14 steps", f"--workdir={whole}")
        assert refused.returncode == 2 and "start another run from it" in refused.stderr.lower()


def test_a_recipe_asks_for_its_initial_weights(command, tmp_path):
    process = command(
        "--config=configs/kinetics400.py:deit_tiny_struct_1_video",
        *(NOISE, *SHORT, "--config.data.size=24", "--config.data.workers=0"),
        f"--workdir={tmp_path / 'run'}",
    )
    assert process.returncode == 2
    assert "this recipe starts from trained weights: name a run" in process.stderr
