"""`python -m structvit_jax.main`, run as a user would: its output, its files and its error messages."""

import json
import os
import shutil
import signal
import stat

import pytest
from conftest import CONFIG, QUICK, ROOT, Command, records
from ml_collections import ConfigDict

from structvit_jax import data
from structvit_jax.config import default_config
from structvit_jax.models.weights import sha256
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.learner import Learner
from structvit_jax.training.start import starting_state


def test_a_run_logs_progress_and_writes_its_files(finished):
    workdir, out = finished
    for phrase in (
        "devices: 1 x cpu",
        "deit_tiny_struct_1_video",
        "starting from scratch",
        "compiling",
        "ETA",
        "data-wait",
    ):
        assert phrase in out
    result = json.loads((workdir / "result.json").read_text())
    assert result.keys() == {"top1", "top5", "mean_class", "examples", "missing", "step", "params_sha256"}
    assert (result["examples"], result["step"], len(result["params_sha256"])) == (20, 12, 64)
    assert f"params_sha256 {result['params_sha256'][:12]}" in out

    config = default_config().to_dict()
    written = json.loads((workdir / "config.json").read_text())
    assert written.keys() == config.keys()
    assert written["model"]["widths"] == [16] and written["train"]["duration"] == "12 steps"

    metrics = records(workdir)
    assert [r["step"] for r in metrics if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in metrics if "eval_top1" in r] == [6, 12]
    assert metrics[-1]["eval_top1"] == result["top1"]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"9", "12"}
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_a_complete_run_is_reported_and_can_be_extended(finished, command, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_bytes()
    again = command(*QUICK, f"--workdir={workdir}")
    assert again.returncode == 0
    assert "the run is complete: step 12 of 12" in again.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before

    result = (workdir / "result.json").read_bytes()
    other = command(*QUICK, f"--workdir={workdir}", "--mode=eval", "--config.data.test_examples=10")
    assert other.returncode == 0, other.stderr
    assert "on 10 examples" in other.stdout and "result.json is kept" in other.stdout
    assert (workdir / "result.json").read_bytes() == result
    (workdir / "result.json").write_text('{"top1": 0.')  # damaged: evaluated again
    evaluated = command(*QUICK, f"--workdir={workdir}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert (workdir / "result.json").read_bytes() == result
    assert (workdir / "metrics.jsonl").read_bytes() == before

    longer = command(*QUICK, f"--workdir={workdir}", "--config.train.duration=14 steps")
    assert longer.returncode == 0, longer.stderr
    assert (
        "config.train.duration is now '14 steps'; the checkpoint was trained with '12 steps'" in longer.stdout
    )
    assert [r["step"] for r in records(workdir) if "loss" in r] == list(range(1, 15))


def test_show_trains_nothing(command, tmp_path):
    process = command(CONFIG, f"--workdir={tmp_path / 'none'}", program="show")
    assert process.returncode == 0, process.stderr
    for phrase in (
        "batch_size: 64",
        "blocks3",
        "total",
        "multiply-accumulates",
        "[64, 8, 24, 24, 3]",
        "200 steps per epoch",
    ):
        assert phrase in process.stdout
    assert not (tmp_path / "none").exists()


def test_weights_of_another_run(finished, command, tmp_path):
    """The run starts from exactly the weights that init_from names."""
    workdir, _ = finished
    config = default_config()
    config.update(ConfigDict(json.loads((workdir / "config.json").read_text())))
    config.init_from = f"{workdir}/checkpoints/12"
    dataset = data.load(config.data, config.augment)
    learner = Learner.create(config, dataset)
    with Checkpoints(tmp_path) as none:
        state = starting_state(learner, dataset, none, 12)
    assert sha256(state.weights) == json.loads((workdir / "result.json").read_text())["params_sha256"]
    assert int(state.step) == 0


def test_a_killed_run_resumes_to_the_same_numbers(finished, command, tmp_path):
    """SIGKILL as soon as a checkpoint appears: during the save or the steps that follow."""
    workdir = tmp_path / "run"
    for step in ("3", "9"):
        killed = Command(tmp_path, *QUICK, f"--workdir={workdir}")
        killed.when(lambda step=step: list((workdir / "checkpoints").glob(f"{step}*")))
        killed.signal(signal.SIGKILL)
        killed.wait()
    saved = any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    resumed = command(*QUICK, f"--workdir={workdir}")
    assert resumed.returncode == 0, resumed.stderr
    assert ("resuming from" if saved else "starting from scratch") in resumed.stdout
    for name in ("result.json", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (finished[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ([CONFIG, "--config.data.test_examples=0"], "set config.data.test_examples to the number"),
        (["--config=configs/folder.py:deit_s,finetun"], "error: unknown stage 'finetun'. Did you mean"),
        (["--config=configs/ablations.py:imagnet"], "unknown data set 'imagnet'. Did you mean 'imagenet'?"),
        ([*QUICK, "--config.optimizer.lr=1e30", "--workdir={tmp}/nan"], "Lower config.optimizer.lr"),
        ([CONFIG, "--config.optimizer.lr=0.0"], "config.optimizer.lr is 0.0"),
        ([CONFIG, "--mode=evaluate"], "'evaluate' is not one of 'train', 'eval'"),
        ([CONFIG, "--config.model.name=structvit_tiny_4_1_vdeo"], "structvit_tiny_4_1_video"),
        (
            [CONFIG, "--config.model.name=structvit_tiny_4_1"],
            "takes [batch, height, width, 3]; the input has shape",
        ),
        ([CONFIG, "--config.data.name=digts"], "'digits'"),
        ([CONFIG, "--workdir=/proc/run"], "/proc/run cannot be used"),
        ([CONFIG, f"--workdir={ROOT / 'README.md'}"], "choose another --workdir"),
        ([CONFIG, "--mode=eval", "--workdir=no/such/run"], "no checkpoint at no/such/run"),
        ([CONFIG, "--config.init_from=no/such/run", "--workdir={tmp}"], "no checkpoint at no/such/run"),
        (
            [CONFIG, "--config.mesh.device=tpu", "--workdir={tmp}"],
            "JAX finds no device for config.mesh.device='tpu'",
        ),
        ([], "set --config, for example --config=moving_digits"),
    ],
)
def test_user_errors_are_one_line(arguments, phrase, refused, tmp_path):
    assert phrase in refused(*[argument.format(tmp=tmp_path) for argument in arguments])


def test_a_checkpoint_of_another_model_is_refused_and_kept(finished, refused):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    other = [argument for argument in QUICK if "model.widths" not in argument]
    for mode in ("train", "eval"):
        line = refused(*other, f"--workdir={workdir}", f"--mode={mode}")
        assert "holds another model" in line and "deit_tiny_struct_1_video with 8 classes" in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_an_nvidia_gpu_that_jax_does_not_see_is_an_error(refused, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    path = f"{tmp_path}:{os.environ['PATH']}"
    workdir = f"--workdir={tmp_path / 'run'}"
    line = refused(*QUICK, workdir, PATH=path, JAX_PLATFORMS="")
    assert "pip install -U 'jax[cuda13]'" in line and "--config.mesh.device=cpu" in line
    options = [CONFIG, "--mode=eval", workdir, "--config.mesh.device=cpu"]
    assert "no checkpoint" in refused(*options, PATH=path, JAX_PLATFORMS="")
