"""Failures that a run in one process survives: signals, full disks, NaN, broken buckets."""

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bucket import Bucket
from conftest import QUICK, SAME, Command, contents, records, refusal, same_as, slowly
from etils import epath
from gcsfs.retry import HttpError

from structvit_jax import data
from structvit_jax.config import default_config
from structvit_jax.data.dataset import ConfiguredDataset
from structvit_jax.runtime import lock, processes
from structvit_jax.runtime.storage import io_errors_as_user_error
from structvit_jax.training import log, step
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError

SLOWLY = functools.partial(slowly, 0.15)


def settled(slow=None):
    """In the subprocess: shorten the wait for writes of other runs in a bucket; `slow` is for `slowly`."""
    lock._SETTLE = dict.fromkeys((True, False), 0.1)
    if slow:
        slowly(slow)


def poisoned(steps):
    """In the subprocess: make the normalised inputs of these steps NaN."""
    batches, normalize = ConfiguredDataset.train_batches, step.normalize

    def marked(self, *arguments, start_step, **options):
        stream = batches(self, *arguments, start_step=start_step, **options)
        for number, batch in enumerate(stream, start_step + 1):
            yield batch | {"inputs": np.full_like(batch["inputs"], 255)} if number in steps else batch

    def broken(inputs, config):
        return jnp.where(jnp.all(inputs == 255), jnp.nan, normalize(inputs, config))

    ConfiguredDataset.train_batches, step.normalize = marked, broken


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(finished, command, tmp_path, number):
    arguments = [*QUICK, f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every="]
    process = Command(tmp_path / "output", *arguments, first=SLOWLY)
    process.when(lambda: process.stdout.count("a slow batch") > 2)
    process.signal(number)
    assert process.wait().returncode == EXIT_RESUMABLE, process.stderr
    (line,) = process.stderr.splitlines()
    (saved,) = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert line == f"stopped by a signal after step {saved} of 12; re-run the command to resume"
    assert not (tmp_path / "run" / "lock.json").exists()
    resumed = command(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {tmp_path}/run/checkpoints/{saved}" in resumed.stdout
    assert same_as(finished, tmp_path / "run")


# A batch takes its worker ten times as long as a step, so the run waits for data nearly all the time.
WORKERS = [*QUICK, "--config.data.workers=1", "--config.augment.randaugment=rand-m9-n8-mstd0.5-inc1"]
WORKERS += ["--config.data.size=32", "--config.train.duration=300 steps", "--config.eval.every="]
WORKERS += ["--config.checkpoint.every="]


def on_terminal(name):
    """In the subprocess: start a session with the terminal `name`."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(terminal, stream)
    sys.stdout = open(os.dup(1), "w")  # noqa: SIM115 - for the rest of the process


def test_a_signal_to_the_group_spares_the_workers(tmp_path):
    """The run saves. Two SIGINT at once, from the terminal and from the parent process, count as one."""
    arguments = [*WORKERS, "--config.data.workers=2", f"--workdir={tmp_path / 'run'}"]
    process = Command(tmp_path / "output", *arguments, first=os.setsid)
    process.when(lambda: "compiled in" in process.stdout)
    time.sleep(1.5)  # into the steps
    workers = children(process.process.pid)
    assert len(workers) == 2
    os.killpg(process.process.pid, signal.SIGINT)
    process.signal(signal.SIGINT)
    assert process.wait().returncode == EXIT_RESUMABLE, process.stderr
    (saved,) = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    (line,) = process.stderr.splitlines()
    assert line == f"stopped by a signal after step {saved} of 300; re-run the command to resume"
    assert not any(map(exists, workers))


def test_a_terminal_that_hangs_up(tmp_path):
    """SIGHUP stops the run, which cannot print any more."""
    ours, theirs = os.openpty()
    first = functools.partial(on_terminal, os.ttyname(theirs))
    process = Command(tmp_path / "output", *WORKERS, f"--workdir={tmp_path / 'run'}", first=first)
    printed = b""
    while b"compiled in" not in printed:
        printed += os.read(ours, 1000)
    time.sleep(1.5)  # into the steps
    os.close(ours)
    os.close(theirs)
    assert process.wait().returncode == EXIT_RESUMABLE
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_killed_run_leaves_nothing(tmp_path):
    arguments = [*WORKERS, f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "temporary").mkdir()
    process = Command(tmp_path / "output", *arguments, TMPDIR=str(tmp_path / "temporary"))
    process.when(lambda: "compiled in" in process.stdout)
    time.sleep(1.5)  # into the steps
    workers = children(process.process.pid)
    assert len(workers) == 1
    process.signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(exists, workers)) and not list((tmp_path / "temporary").iterdir())


def children(parent):
    """Return the ids of the children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def exists(pid):
    return Path(f"/proc/{pid}").exists()


def slow_test():
    """In the subprocess: make test batches slow."""
    batches = ConfiguredDataset.test_batches

    def slow(self, *arguments, **options):
        for batch in batches(self, *arguments, **options):
            yield batch
            print("a slow test batch", flush=True)
            time.sleep(1)

    ConfiguredDataset.test_batches = slow


def test_a_signal_in_the_last_evaluation_ends_it(finished, copy, command, tmp_path):
    """The state is saved already, so the run ends at once, and the same command evaluates again."""
    result = (copy / "result.json").read_bytes()
    (copy / "result.json").unlink()
    arguments = [*QUICK, f"--workdir={copy}", "--config.eval.batch_size=4"]
    process = Command(tmp_path / "output", *arguments, first=slow_test)
    process.when(lambda: "a slow test batch" in process.stdout)
    process.signal(signal.SIGTERM)
    assert process.wait().returncode == EXIT_RESUMABLE, process.stderr
    assert process.stderr == (
        "stopped by a signal in the evaluation after step 12; re-run the command to evaluate\n"
    )
    assert command(*arguments).returncode == 0
    assert (copy / "result.json").read_bytes() == result


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = Command(tmp_path, *QUICK, f"--workdir={tmp_path / 'run'}", first=functools.partial(slowly, 60))
    process.when(lambda: "a slow batch" in process.stdout)
    process.signal(signal.SIGINT)
    time.sleep(0.5)
    process.signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait().returncode == 130, process.stderr
    assert time.monotonic() - started < 10
    (line,) = process.stderr.splitlines()
    assert line == "interrupted; re-run the command to resume from the last checkpoint"


def test_signals_raise_in_other_programs():
    """The first is noted, a second Ctrl-C raises, and the previous handlers are restored."""
    before = signal.getsignal(signal.SIGINT)
    with processes.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        assert stop.before(1)
        with pytest.raises(KeyboardInterrupt):
            started = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        assert time.monotonic() - started < 5  # the wait was interrupted
        time.sleep(0.3)
    assert signal.getsignal(signal.SIGINT) == before
    with processes.StopSignal() as stop:
        assert not stop.before(1)


# Disks and buckets that fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 2),
        (TimeoutError("no answer"), EXIT_RESUMABLE),
        (HttpError({"code": 503, "message": "busy"}), EXIT_RESUMABLE),
        (HttpError({"code": 403, "message": "forbidden"}), 2),
        (PermissionError(13, "Forbidden", "gs://b/x/checkpoints/500"), 2),  # 500 is a step here
    ],
)
def test_transient_errors_are_resumable(error, code):
    with (
        pytest.raises(UserError, match="cannot be used") as caught,
        io_errors_as_user_error(epath.Path("gs://b/x")),
    ):
        raise error
    assert caught.value.exit_code == code


def test_a_full_disk_ends_in_one_line_and_loses_nothing(finished, copy, command, refused):
    shutil.rmtree(copy / "checkpoints" / "12")
    before = contents(copy / "checkpoints")
    # The sizes of the arrays' files vary, so the limit derives from the metadata.
    size = (copy / "checkpoints" / "9" / "optimizer" / "_METADATA").stat().st_size // 2
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    line = refused(*QUICK, f"--workdir={copy}", first=limit)
    assert "File too large" in line and "cannot be used" in line
    assert before.items() <= contents(copy / "checkpoints").items()
    resumed = command(*QUICK, f"--workdir={copy}")
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stderr
    assert same_as(finished, copy)


def test_events_that_cannot_be_written_raise(tmp_path):
    """A full disk raises an error, instead of blocking the run."""
    board = log._Board(epath.Path(tmp_path), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            for number in range(100):
                board.add("train", number, {"loss": 1.0})
                board.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_workdir_that_vanishes(finished, command, tmp_path):
    process = Command(tmp_path / "output", *QUICK, f"--workdir={tmp_path / 'run'}", first=SLOWLY)
    process.when((tmp_path / "run" / "checkpoints" / "3").exists)
    (tmp_path / "run").rename(tmp_path / "away")
    assert f"{tmp_path}/run is gone: it was removed or renamed" in refusal(process.wait())
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "run")
    resumed = command(*QUICK, f"--workdir={tmp_path / 'run'}")
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stderr
    assert same_as(finished, tmp_path / "run")


# Losses that are not finite


def test_a_step_that_is_not_finite_changes_nothing(refused, tmp_path):
    """The step is logged with its examples, and the run continues; too many in a row end it.

    Steps in a row are counted over restarts.
    """
    options = [*QUICK, f"--workdir={tmp_path}", "--config.checkpoint.every=1 steps"]
    options += ["--config.train.max_skipped=3", "--config.checkpoint.keep=20", "--config.model.depths=(1,)"]
    poison = functools.partial(poisoned, {3, 5, 6, 7})
    for _ in range(2):  # the second run resumes after step 6, and step 7 alone would not end it
        line = refused(*options, first=poison)
        assert "step 7: " in line and "in 3 steps in a row" in line
        assert "config.optimizer.lr" in line and f"{tmp_path}/skipped.jsonl" in line
    losses = {r["step"]: (r["loss"] is None, r.get("skipped")) for r in records(tmp_path) if "loss" in r}
    assert losses == {n: (True, 1) if n in (3, 5, 6, 7) else (False, None) for n in range(1, 8)}
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [3, 5, 6, 7]
    config = default_config()
    config.data.train_examples, config.data.test_examples = 40, 20
    ids = {data.load(config.data, config.augment).train_id(i) for i in range(40)}
    assert all(len(line["examples"]) == 8 and set(line["examples"]) <= ids for line in skipped)

    def files(number):
        with Checkpoints(tmp_path) as checkpoints:
            items = dict.fromkeys(("weights", "optimizer"), ocp.args.StandardRestore())
            saved = checkpoints._restore(number, **items)
        return jax.device_get((saved["weights"], saved["optimizer"]))

    chex.assert_trees_all_equal(files(3), files(2))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(files(4), files(3))


# Buckets


def test_a_run_in_a_bucket(finished, tmp_path):
    """Kills during two saves and a failure of the bucket do not change the result."""
    with Bucket() as bucket:

        def start(slow=None):
            arguments, first = [*QUICK, "--workdir=gs://bucket/runs/a"], functools.partial(settled, slow)
            return Command(tmp_path, *arguments, first=first, **bucket.environment)

        def saving(number):
            return any(name.startswith(f"runs/a/checkpoints/{number}/") for name in list(bucket.objects))

        def saved(number):
            return b"weights" in bucket.objects.get(f"runs/a/checkpoints/{number}/sha256.json", b"")

        for happens in (lambda: saving(3), lambda: saving(6)):
            process = start(slow=0.15)
            process.when(happens)
            process.signal(signal.SIGKILL)
            process.wait()
        process = start(slow=0.15)
        process.when(lambda: saved(9))
        bucket.broken = True
        assert process.wait().returncode == 2, process.stderr
        (line,) = [line for line in process.stderr.splitlines() if "AUTH_TOKEN_FOR_TESTING" not in line]
        assert line.startswith("error: gs://bucket/runs/a") and "the bucket is out of order" in line
        bucket.broken = False
        process = start().wait()
        assert process.returncode == 0, process.stderr
        assert "resuming from gs://bucket/runs/a/checkpoints/9" in process.stdout
        for name in SAME:
            assert bucket.objects[f"runs/a/{name}"] == (finished[0] / name).read_bytes()
        left = {name.split("/")[3] for name in bucket.objects if name.startswith("runs/a/checkpoints/")}
        assert left == {"9", "12"}
