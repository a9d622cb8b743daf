"""Runs of two processes, four fake devices each, against one process with eight."""

import functools
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from conftest import QUICK, Command, devices, processes, records, refusal, slowly

from structvit_jax import data
from structvit_jax.data.dataset import ConfiguredDataset
from structvit_jax.runtime import processes as run_processes
from structvit_jax.utils.errors import EXIT_RESUMABLE

# Wide enough for parameters to be split over fsdp.
WIDE = [argument.replace("(16,)", "(128,)") for argument in QUICK]
WIDE += ["--config.model.depths=(1,)", "--config.mesh.heartbeat=5"]
WIDE += [f"--config.{key}=4 steps" for key in ("checkpoint.every", "eval.every")]
WIDE += ["--config.train.duration=8 steps"]
LAYOUT = ["--config.mesh.data=4", "--config.mesh.fsdp=2"]
SLOWLY = functools.partial(slowly, 0.3)


def unreadable():
    """In a command: make an example unreadable."""
    batches = ConfiguredDataset.train_batches

    def torn(self, *arguments, **options):
        for batch in batches(self, *arguments, **options):
            yield batch | {"problems": (data.Problem("7", "torn"),)}

    ConfiguredDataset.train_batches = torn


def named(process, number):
    return f"process {number} of 2 (host {os.uname().nodename}, pid {process.process.pid})"


def test_two_processes_are_stopped_and_end_like_one(tmp_path):
    """A signal to one of them saves in both. After a resume, the result equals that of one process."""
    arguments = [*WIDE, *LAYOUT, f"--workdir={tmp_path / 'two'}"]
    steps = tmp_path / "two" / "checkpoints"
    both = processes(tmp_path / "a", *arguments, first=(SLOWLY, SLOWLY))
    both[0].when(lambda: both[0].stdout.count("a slow batch") > 4)  # two are read ahead
    both[1].signal(signal.SIGTERM)
    assert [process.wait().returncode for process in both] == [EXIT_RESUMABLE] * 2, both[0].stderr
    lines = [re.findall(r"stopped by a signal after step (\d+)", process.stderr) for process in both]
    ((stopped,), other) = lines
    assert other == [stopped] and (steps / stopped).exists()
    assert set(both[1].stdout.splitlines()) <= {"a slow batch"}  # only the primary process logs its steps

    both = processes(tmp_path / "b", *arguments, first=(SLOWLY, SLOWLY))
    both[0].when(lambda: "compiling" in both[0].stdout)  # a signal before the first step of a resumed run
    assert f"resuming from {steps}/{stopped}" in both[0].stdout
    both[0].signal(signal.SIGTERM)
    assert [process.wait().returncode for process in both] == [EXIT_RESUMABLE] * 2, both[0].stderr
    assert f"stopped by a signal after step {stopped} of 8" in both[0].stderr

    both = processes(tmp_path / "c", *arguments, first=(None, unreadable))
    one = Command(tmp_path / "d", *WIDE, *LAYOUT, f"--workdir={tmp_path / 'one'}", **devices(8))
    assert [process.wait().returncode for process in (*both, one)] == [0, 0, 0], both[0].stderr
    lines = [line for line in both[0].stdout.splitlines() if line]
    assert not both[1].stdout and len(set(lines)) == len(lines)
    assert (tmp_path / "two" / "unreadable.tsv").read_text() == "train\t7\ttorn\n"
    two, single = (records(tmp_path / name) for name in ("two", "one"))
    assert [r.keys() for r in two] == [r.keys() for r in single] and len(two) == 10
    losses = [[r["loss"] for r in lines if "loss" in r] for lines in (two, single)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert [r["step"] for r in two if "loss" in r] == list(range(1, 9))

    both = processes(tmp_path / "e", *WIDE, *LAYOUT, f"--workdir={tmp_path / 'one'}", "--mode=eval")
    assert [process.wait().returncode for process in both] == [0, 0], both[0].stderr
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert f"params_sha256 {result['params_sha256'][:12]}" in one.stdout

    warm = [*WIDE, *LAYOUT, f"--config.init_from={tmp_path / 'one'}"]
    warm += ["--config.checkpoint.every=", "--config.eval.every="]  # the first step is compared
    both = processes(tmp_path / "f", *warm, f"--workdir={tmp_path / 'warm'}")
    one = Command(tmp_path / "g", *warm, f"--workdir={tmp_path / 'alone'}", **devices(8))
    assert [process.wait().returncode for process in (*both, one)] == [0, 0, 0], both[0].stderr
    assert "fine-tuning: starting at step 0 from the deit_tiny_struct_1_video" in both[0].stdout
    two, single = (records(tmp_path / name)[0]["loss"] for name in ("warm", "alone"))
    assert two == pytest.approx(single, rel=1e-5) and single != losses[1][0]


@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)]
)
def test_a_lost_process_is_named(tmp_path, victim, number):
    """Without the heartbeat, JAX would abort the other process with a stack trace if process 0 is lost."""
    both = processes(tmp_path / "a", *WIDE, f"--workdir={tmp_path / 'run'}")
    both[0].when(lambda: "compiling" in both[0].stdout)
    both[victim].signal(number)
    lost, other = time.monotonic(), both[1 - victim]
    assert other.wait().returncode == EXIT_RESUMABLE, other.stderr
    assert time.monotonic() - lost < 5 + 10
    name = named(both[victim], victim)
    fate = f"no heartbeat from {name} for 5 s; assuming it is dead"
    if (victim, number) == (0, signal.SIGKILL):
        fate = f"{name} is gone"
    line = f"error: {fate}; process {1 - victim} of 2 ends as well; re-run the command to resume"
    assert other.stderr.splitlines()[-1] == line
    if number == signal.SIGSTOP:
        assert other.stderr == f"{line}\n"
        both[0].signal(signal.SIGCONT)
        assert both[0].wait().returncode == EXIT_RESUMABLE, both[0].stderr


def test_a_user_error_of_one_process_ends_both(tmp_path):
    """Each prints one line and has the exit code of a user error."""
    wrong = "--config.eval.batch_size=12"
    both = processes(tmp_path / "a", *WIDE, f"--workdir={tmp_path / 'run'}", more=((), (wrong,)))
    lines = [refusal(process.wait()) for process in both]
    assert lines[1].startswith("error: config.eval.batch_size is 12, not divisible by 8 devices")
    assert f"{named(both[1], 1)} failed: config.eval.batch_size is 12" in lines[0]


def impatient():
    run_processes.JOIN_TIMEOUT = 2


def absent():
    os._exit(0)


def test_a_process_that_waits_for_one_that_never_comes(tmp_path):
    """It gives up with one line instead of JAX's stack trace."""
    for first in ((impatient, absent), (absent, impatient)):
        waiting = processes(tmp_path / "a", *QUICK, f"--workdir={tmp_path / 'run'}", first=first)
        process = waiting[first.index(impatient)].wait()
        assert process.returncode == EXIT_RESUMABLE, process.stderr
        (line,) = [line for line in process.stderr.splitlines() if line]
        assert line.startswith("error: not all processes of the run have connected within 2 s at 127.0.0.1:")
