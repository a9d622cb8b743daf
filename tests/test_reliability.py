"""What a run survives, in one process: damage, signals, rivals, full disks, NaN, broken buckets."""

import functools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import chex
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bucket import Bucket
from conftest import QUICK, Command, records, refusal, slowly
from etils import epath
from test_training import setup, small_config

from structvit_jax import data
from structvit_jax.config import default_config
from structvit_jax.errors import RESUMABLE, UserError
from structvit_jax.models.weights import Weights
from structvit_jax.training import digests, goodput, lock, log, mesh, optim, program, step
from structvit_jax.training.checkpoint import Checkpoints, Keep
from structvit_jax.training.goodput import Goodput
from structvit_jax.training.lock import WorkdirLock
from structvit_jax.training.step import init_state

SAME = ("result.json", "metrics.jsonl")


def poisoned(steps):
    """In a command: the normalised inputs of these steps are not numbers."""
    batches, normalize = data.Dataset.train_batches, step.normalize

    def marked(self, *arguments, start_step, **options):
        stream = batches(self, *arguments, start_step=start_step, **options)
        for number, batch in enumerate(stream, start_step + 1):
            yield batch | {"inputs": np.full_like(batch["inputs"], 255)} if number in steps else batch

    def broken(inputs, config):
        return jnp.where(jnp.all(inputs == 255), jnp.nan, normalize(inputs, config))

    data.Dataset.train_batches, step.normalize = marked, broken


SLOWLY = functools.partial(slowly, 0.15)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the complete run."""
    return shutil.copytree(finished[0], tmp_path / "run")


def same_as(finished, workdir):
    return all((workdir / name).read_bytes() == (finished[0] / name).read_bytes() for name in SAME)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Digests


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {"flipped": flip, "truncated": truncate, "removed": os.unlink}


def test_every_damage_to_every_file_is_found(copy):
    folder = epath.Path(copy / "checkpoints" / "12")
    files = {path: path.read_bytes() for path in (copy / "checkpoints" / "12").rglob("*") if path.is_file()}
    assert len(files) > 10 and digests.damage(folder) == ""
    for path, content in files.items():
        for kind, damage in DAMAGES.items():
            damage(path)
            assert digests.damage(folder), f"{path} {kind}"
            path.write_bytes(content)
    assert digests.damage(folder) == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("weights/*/d/*", "flipped"), ("optimizer/_METADATA", "truncated"), ("sha256.json", "removed")],
)
def test_the_checkpoint_before_a_damaged_one_is_used(finished, copy, command, name, kind):
    """Said in a line; the damaged one is set aside, and the run ends as if nothing had happened."""
    folder = copy / "checkpoints" / "12"
    path = max(folder.glob(name), key=lambda path: path.stat().st_size)
    DAMAGES[kind](path)
    left = len(contents(folder))
    process = command(*QUICK, f"--workdir={copy}")
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if "damaged" in line]
    assert line.startswith(f"warning: {folder} is damaged (") and "; step 9 is used" in line
    assert line.endswith(f"set aside as {copy / 'damaged' / '12'}")
    assert len(contents(copy / "damaged" / "12")) == left
    assert same_as(finished, copy) and (folder / "sha256.json").exists()


def test_what_damage_leaves_to_the_command(finished, copy, command, refused):
    """Evaluation moves nothing; a damaged step that is named is refused; without a whole one nothing goes."""
    flip(copy / "checkpoints" / "12" / "card" / "metadata")
    before = contents(copy / "checkpoints")
    process = command(*QUICK, f"--workdir={copy}", "--mode=eval")
    assert process.returncode == 0, process.stderr
    assert "12 is damaged (card/metadata is not what was saved); step 9 is used\n" in process.stdout
    assert "evaluating step 9" in process.stdout
    named = f"--config.init_from={copy}/checkpoints/12"
    line = refused(*QUICK, named, f"--workdir={copy.parent / 'other'}")
    assert "checkpoints/12 is damaged: card/metadata is not what was saved" in line
    assert contents(copy / "checkpoints") == before

    flip(copy / "checkpoints" / "9" / "card" / "metadata")
    before = contents(copy / "checkpoints")
    for mode in ("train", "eval"):
        line = refused(*QUICK, f"--workdir={copy}", f"--mode={mode}")
        assert "12 is damaged (card/metadata" in line and "move them away to start again" in line
    assert contents(copy / "checkpoints") == before


# What is kept, and where it can be restored


def tiny_state(number, grid=None):
    """A state of a few arrays, of which one is large enough to be split."""
    grid = grid or mesh.make_mesh(1, 1, jax.devices()[:1])
    random = np.random.default_rng(number)
    shapes = {"fc.kernel": (256, 128), "fc.bias": (128,), "odd.kernel": (129, 131)}
    params = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    state = init_state(
        Weights(params, {"norm.mean": random.standard_normal(128, np.float32)}),
        optim.make_optimizer(default_config().optimizer),
        grid,
    )
    return state._replace(step=jnp.int32(number))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(2), {9, 10}),
        (Keep(1, best=2), {10, 3, 7}),
        (Keep(1, every=4), {10, 4, 8}),
        (Keep(1, best=1, every=5), {10, 3, 5}),
    ],
)
def test_which_checkpoints_stay(tmp_path, keep, kept):
    """The last, the best of those evaluated (odd steps here, 3 before 7), and every so many."""
    top1 = {1: 0.1, 3: 0.9, 5: 0.2, 7: 0.8, 9: 0.3}
    state = tiny_state(0)
    for steps in (range(1, 6), range(6, 11)):  # as a run that is resumed
        with Checkpoints(tmp_path, keep) as checkpoints:
            for number in steps:
                scores = {"top1": top1[number]} if number in top1 else None
                checkpoints.save(state._replace(step=jnp.int32(number)), {}, scores)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == kept


def test_a_run_keeps_the_best_of_its_evaluations(finished, command, tmp_path):
    """What is saved for being evaluated changes no number of the run."""
    options = ["--config.eval.every=2 steps", "--config.checkpoint.keep=1"]
    options += ["--config.checkpoint.keep_best=1", "--config.checkpoint.keep_every=9 steps"]
    process = command(*QUICK, *options, f"--workdir={tmp_path}")
    assert process.returncode == 0, process.stderr
    top1 = {r["step"]: r["eval_top1"] for r in records(tmp_path) if "eval_top1" in r and r["step"] < 12}
    assert list(top1) == [2, 4, 6, 8, 10]
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    (best,) = steps - {9, 12}
    assert top1[best] == max(top1.values())
    assert (tmp_path / "result.json").read_bytes() == (finished[0] / "result.json").read_bytes()


def test_eight_devices_save_and_others_restore(tmp_path):
    """Bit for bit, on 1, 2 and 4 devices."""
    state = tiny_state(3, mesh.make_mesh(2, 4))
    assert not state.weights.params["fc.kernel"].sharding.is_fully_replicated
    with Checkpoints(tmp_path, Keep(1)) as checkpoints:
        checkpoints.save(state, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        for ways in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4)):
            grid = mesh.make_mesh(*ways, jax.devices()[: math.prod(ways)])
            restored = checkpoints.state(3, tiny_state(0, grid), grid, "")
            assert restored.weights.params["fc.kernel"].sharding.is_fully_replicated == (ways[1] == 1)
            chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    """Whatever name they have got as far as."""
    folder = tmp_path / "checkpoints"
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-written"):
        (folder / name / "weights").mkdir(parents=True)
        (folder / name / "_CHECKPOINT_METADATA").write_text("{}")
    with Checkpoints(tmp_path, Keep(2)) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(tiny_state(3), {})
    assert [path.name for path in folder.iterdir()] == ["3"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(finished, command, tmp_path, number):
    arguments = [*QUICK, f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every="]
    process = Command(tmp_path / "output", *arguments, first=SLOWLY)
    process.when(lambda: "compiled in" in process.stdout)
    time.sleep(0.4)
    process.signal(number)
    assert process.wait().returncode == RESUMABLE, process.stderr
    (line,) = process.stderr.splitlines()
    (saved,) = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert line == f"stopped by a signal after step {saved} of 12; the same command resumes"
    assert not (tmp_path / "run" / "lock.json").exists()
    resumed = command(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {tmp_path}/run/checkpoints/{saved}" in resumed.stdout
    assert same_as(finished, tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = Command(tmp_path, *QUICK, f"--workdir={tmp_path / 'run'}", first=functools.partial(slowly, 60))
    process.when(lambda: "compiled in" in process.stdout)
    process.signal(signal.SIGINT)
    time.sleep(0.5)
    process.signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait().returncode == 130, process.stderr
    assert time.monotonic() - started < 10
    (line,) = process.stderr.splitlines()
    assert line == "interrupted; the same command goes on from the last checkpoint"


# Two runs in one workdir


def test_a_second_run_is_refused_and_the_first_goes_on(finished, refused, tmp_path):
    first = Command(tmp_path / "output", *QUICK, f"--workdir={tmp_path / 'run'}", first=SLOWLY)
    first.when((tmp_path / "run" / "lock.json").exists)
    line = refused(*QUICK, f"--workdir={tmp_path / 'run'}")
    assert f"is being written by another run (host {os.uname().nodename}, pid {first.process.pid});" in line
    assert first.wait().returncode == 0, first.stderr
    assert same_as(finished, tmp_path / "run") and not (tmp_path / "run" / "lock.json").exists()


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, monkeypatch):
    """A workdir on a disk, and one in a bucket, for this process."""
    if request.param == "disk":
        yield epath.Path(tmp_path)
        return
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    with Bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(lock, "_SETTLE", dict.fromkeys((True, False), 0.1))
        yield epath.Path("gs://bucket/run")
        fsspec.get_filesystem_class("gs").clear_instance_cache()


HELD = "import sys, time; from etils import epath; from structvit_jax.training.lock import WorkdirLock;"
HELD += "WorkdirLock(epath.Path(sys.argv[1])).__enter__(); print('held', flush=True); time.sleep(100)"


def test_a_killed_owner_is_not_waited_for(place):
    """Though nobody has asked for its exit code: it is a zombie then."""
    owner = subprocess.Popen([sys.executable, "-c", HELD, str(place)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another run .*pid {owner.pid}"):
        WorkdirLock(place).__enter__()
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    with WorkdirLock(place) as mine:
        assert time.monotonic() - started < 2
        mine.check()
    owner.wait()
    owner.stdout.close()
    assert not (place / lock.FILE).exists()


def elsewhere(place, monkeypatch, **options):
    """A lock taken by another machine."""
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_boot", lambda: "another")
        return WorkdirLock(place, **options)


def test_an_owner_on_another_machine_is_waited_for(place, monkeypatch):
    """As long as it may take to renew: refused if it does, taken over if it does not."""
    owner = elsewhere(place, monkeypatch, renew=0.2)
    with owner, pytest.raises(UserError, match="another run"):
        WorkdirLock(place, expiry=30).__enter__()
    silent = elsewhere(place, monkeypatch, renew=1000)
    with silent:
        started = time.monotonic()
        with WorkdirLock(place, expiry=1, renew=0.2) as mine:
            assert time.monotonic() - started > 1
            mine.check()
            silent._renew = 0.1
    assert not (place / lock.FILE).exists()


def test_an_owner_that_lost_the_lock_stops(place, monkeypatch):
    """And leaves the lock to the one that has it."""
    with WorkdirLock(place, renew=0.1) as mine:
        mine.check()
        theirs = elsewhere(place, monkeypatch)
        theirs._write()
        mine._thread.join(10)
        with pytest.raises(UserError, match="is being written by another run"):
            mine.check()
    assert (place / lock.FILE).exists()


# Disks that refuse


def test_a_full_disk_ends_in_one_line_and_loses_nothing(finished, copy, command, refused):
    shutil.rmtree(copy / "checkpoints" / "12")
    before = contents(copy / "checkpoints")
    largest = max(map(len, before.values()))
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    line = refused(*QUICK, f"--workdir={copy}", first=limit)
    assert "File too large" in line and "cannot be used" in line
    assert before.items() <= contents(copy / "checkpoints").items()
    resumed = command(*QUICK, f"--workdir={copy}")
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stderr
    assert same_as(finished, copy)


def test_events_that_cannot_be_written_raise(tmp_path):
    """They do not make the run wait for ever."""
    board = log._Board(epath.Path(tmp_path), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            for number in range(100):
                board.add("train", {"step": number, "loss": 1.0})
                board.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_workdir_that_vanishes(finished, command, tmp_path):
    process = Command(tmp_path / "output", *QUICK, f"--workdir={tmp_path / 'run'}", first=SLOWLY)
    process.when((tmp_path / "run" / "checkpoints" / "3").exists)
    (tmp_path / "run").rename(tmp_path / "away")
    assert f"{tmp_path}/run" in refusal(process.wait())
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "run")
    resumed = command(*QUICK, f"--workdir={tmp_path / 'run'}")
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stderr
    assert same_as(finished, tmp_path / "run")


# Numbers that are none


def test_a_step_without_a_number_changes_nothing(refused, tmp_path):
    """It is marked, its examples are named, the run goes on; too many in a row end it, restarts included."""
    options = [*QUICK, f"--workdir={tmp_path}", "--config.checkpoint.every=1 steps"]
    options += ["--config.train.max_skipped=3", "--config.checkpoint.keep=20", "--config.model.depths=(1,)"]
    poison = functools.partial(poisoned, {3, 5, 6, 7})
    for _ in range(2):  # by itself, step 7 would not end the second
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


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
@pytest.mark.parametrize(
    ("files", "unfinished"),
    [
        ({"weights/a": "1"}, True),
        ({"weights/a": "1", "sha256.json": "{}"}, True),
        ({"weights/a": "1", "sha256.json": "{}", "commit_success.txt": "yes"}, True),
        ({"weights/a": "1", "commit_success.txt": "yes"}, False),
        ({"weights/a": "1", "sha256.json": ""}, False),
    ],
)
def test_a_save_in_a_bucket_is_finished_by_its_digests(place, files, unfinished):
    """What a kill left is removed; what only damage can have done stays, and is said."""
    folder = place / "checkpoints" / "3"
    for name, text in files.items():
        (folder / name).write_text(text)
    if unfinished:
        assert Checkpoints(place, Keep(1)).latest() is None
    else:
        with pytest.raises(UserError, match=r"is damaged \(.*sha256\.json"):
            Checkpoints(place, Keep(1))
    assert folder.exists() != unfinished


def test_a_run_in_a_bucket(finished, tmp_path):
    """Killed in its first save and in another, broken, mended: it ends as on a disk."""
    with Bucket() as bucket:

        def start(**options):
            arguments = [*QUICK, "--workdir=gs://bucket/runs/a"]
            return Command(tmp_path, *arguments, **options, **bucket.environment)

        def saving(number):
            return any(name.startswith(f"runs/a/checkpoints/{number}/") for name in list(bucket.objects))

        def saved(number):
            return b"weights" in bucket.objects.get(f"runs/a/checkpoints/{number}/sha256.json", b"")

        for happens in (lambda: saving(3), lambda: saving(6)):
            process = start(first=SLOWLY)
            process.when(happens)
            process.signal(signal.SIGKILL)
            process.wait()
        process = start(first=SLOWLY)
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


# Where the time goes


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


def test_goodput_counts_every_second_once(tmp_path, monkeypatch):
    """Over a kill and a resume, with what the kill undid as lost."""
    clock = Clock(monkeypatch)
    workdir = epath.Path(tmp_path)
    first = Goodput(workdir, clock.now - 5)  # imports
    first.resume(0)
    for activity, seconds in (("compile", 10), ("input", 2), ("step", 18)):
        first.switch(activity)
        clock.pass_(seconds)
    first.switch("save")
    first.saved(10)
    clock.pass_(3)
    first.switch("step")
    clock.pass_(20)
    first.saved(20)  # its save is killed
    first.write()

    second = Goodput(workdir)
    second.switch("restore")
    clock.pass_(2)
    second.resume(10)
    second.switch("step")
    clock.pass_(40)
    second.write()
    written = json.loads((tmp_path / goodput.FILE).read_text())
    seconds = written["seconds"]
    assert seconds.keys() == set(goodput.ACTIVITIES) and written["sessions"] == 2
    assert sum(seconds.values()) == pytest.approx(5 + 10 + 2 + 18 + 3 + 20 + 2 + 40)
    assert seconds["lost"] == pytest.approx(20)
    assert seconds["step"] + seconds["input"] == pytest.approx(2 + 18 + 40)
    assert [seconds[name] for name in ("start", "restore", "compile", "save")] == [5, 2, 10, 3]
    assert second.describe() == (
        "goodput: 59% of 100 s in 2 sessions in steps; lost 20%, compile 10%, start 5%, save 3%, restore 2%,"
        " input 1%"
    )


def test_a_run_tells_its_goodput(finished):
    workdir, out = finished
    (line,) = [line for line in out.splitlines() if line.startswith("goodput: ")]
    assert " s in steps; " in line and "compile" in line
    written = json.loads((workdir / "goodput.json").read_text())
    assert written["sessions"] == 1 and min(written["seconds"][name] for name in ("step", "compile")) > 0


# Accumulation, profile, memory


def test_accumulated_parts_are_the_whole_batch():
    """Rows that do not count lie unevenly among the parts; no example leaves its device."""
    config = small_config(name="deit_tiny_struct_1", widths=(16,), head_width=8, depths=(1,))
    config.model.drop_path, config.data.batch_size = 0.0, 32
    digits = data.load(config.data, config.augment)
    stream = digits.train_batches(32, start_step=0)
    batches = [next(stream) | {"mask": np.arange(32) % (7 + n) > n * 2} for n in range(3)]
    stream.close()
    results = {}
    for config.train.accumulate in (1, 4):
        grid, _, state, step_fn = setup(config, 4, 2)
        compiled = step_fn.lower(state, mesh.put_batch(grid, batches[0])).compile()
        losses = []
        for batch in batches:
            state, metrics = compiled(state, mesh.put_batch(grid, batch))
            losses.append([float(metrics[key]) for key in ("loss", "top1", "grad_norm")])
        results[config.train.accumulate] = losses, jax.device_get(state.weights.params)
    np.testing.assert_allclose(results[4][0], results[1][0], rtol=1e-5)
    chex.assert_trees_all_close(results[4][1], results[1][1], rtol=1e-5, atol=1e-5)
    text = compiled.as_text()
    assert "while" in text and "all-to-all" not in text and "collective-permute" not in text


def test_a_profile_of_some_steps(command, tmp_path):
    process = command(*QUICK, f"--workdir={tmp_path}", "--config.profile=3:5")
    assert process.returncode == 0, process.stderr
    assert f"profile of steps 3 to 4: {tmp_path}/profile" in process.stdout
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


MESSAGES = [  # of XLA on a GPU, on a TPU and on a CPU, and what was asked for
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes.", "20.0 GiB"),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB. [type='xla']", "1.50GiB"),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used"
        " 23.10G of 15.48G hbm. Exceeded hbm capacity by 7.62G. Total hbm usage >= 23.62G: reserved 530.00M"
        " program 23.10G arguments 1.02G",
        "23.10G",
    ),
    (
        "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 12.21G. That was not"
        " possible. There are 9.47G free.; (0x0x0_HBM0)",
        "12.21G",
    ),
    ("INTERNAL: RET_CHECK failure: Out of memory allocating 4398046511104 bytes.", "4096.0 GiB"),
]


@pytest.mark.parametrize(("message", "asked"), MESSAGES)
def test_a_lack_of_memory_says_what_to_lower(message, asked):
    with pytest.raises(UserError) as raised, program.naming_memory(default_config()):
        raise jax.errors.JaxRuntimeError(message)
    text = str(raised.value)
    assert text.startswith(f"out of memory: the program asked for {asked};") and "\n" not in text
    for word in ("config.data.batch_size (now 64)", "config.train.accumulate (now 1)", "config.model.remat"):
        assert word in text


def test_a_real_lack_of_memory_is_named():
    """And what is none stays what it is."""
    with pytest.raises(UserError, match="out of memory: the program asked for"):  # noqa: SIM117
        with program.naming_memory(default_config()):
            jax.jit(lambda: jnp.zeros((2**40,), jnp.float32) + 1)().block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), program.naming_memory(default_config()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
