"""Goodput, progress lines, gradient accumulation, profiles and out-of-memory errors of a run."""

import json
import os
import threading
import time
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import COMPILED_SOON, QUICK, records
from etils import epath
from small import setup, small_config

from structvit_jax import data
from structvit_jax.config import default_config
from structvit_jax.data.stages import STAGES
from structvit_jax.runtime import goodput, mesh
from structvit_jax.runtime.device_clock import DeviceClock
from structvit_jax.runtime.goodput import Goodput
from structvit_jax.training import learner, log
from structvit_jax.training.loop import evaluation_due
from structvit_jax.utils.errors import UserError


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


def test_goodput_counts_every_second_once(tmp_path, monkeypatch):
    """Over a kill and a resume; steps that the kill undid count as lost."""
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


def test_an_overlap_counts_as_the_next_activity(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    count = Goodput(epath.Path(tmp_path), clock.now)
    count.switch("input")
    clock.pass_(5)
    count.switch("step", overlap=3)
    count.switch("input")
    count.switch("step", overlap=1e-9)  # never negative
    count.write()
    seconds = goodput.seconds_of(epath.Path(tmp_path))
    assert (seconds["input"], seconds["step"]) == (2, 3)


def test_a_run_logs_its_goodput(finished):
    workdir, out = finished
    (line,) = [line for line in out.splitlines() if line.startswith("goodput: ")]
    assert " s in steps; " in line and "compile" in line
    written = json.loads((workdir / "goodput.json").read_text())
    assert written["sessions"] == 1 and min(written["seconds"][name] for name in ("step", "compile")) > 0


# Progress lines


@pytest.fixture
def run_log(tmp_path, monkeypatch, capsys):
    """Log intervals of (steps, seconds per step, seconds of waiting per step); return the lines printed."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    array = dict.fromkeys(("loss", "top1", "lr", "grad_norm"), np.float32(1))
    array |= {"index": np.zeros(1, np.int32), "skipped": np.bool_(False)}

    def lines(total, *intervals, slowest="decode", **options):
        """Options are keys of the configuration, such as `data__workers=2`."""
        config = default_config()
        config.data.name = "folder"
        for key, value in options.items():
            section, _, name = key.partition("__")
            config[section][name] = value
        reading = dict.fromkeys(STAGES, 0.1) | {slowest: 0.5}
        source = types.SimpleNamespace(unit="images", train_id=str)
        workdir = epath.Path(tmp_path)
        step = 0
        with log.RunLog(workdir, 0, total, config, source, Goodput(workdir), lambda: None) as run_log:
            for steps, seconds, waited in intervals:
                for _ in range(steps):
                    step += 1
                    clock.pass_(seconds)
                    run_log.step(step, dict(array), waited, reading)
                run_log.flush()
        return capsys.readouterr().out.splitlines()

    return lines


def notes_in(lines):
    return [line for line in lines if line.startswith("note: ")]


def remaining(line):
    hours, minutes, seconds = map(int, line.partition("ETA ")[2].split(":"))
    return 3600 * hours + 60 * minutes + seconds


def test_the_remaining_time_does_not_jump(run_log):
    """A few slow steps change the average only in proportion to their duration."""
    quiet, slow = (100, 0.1, 0.0), (2, 1.0, 0.0)
    printed = run_log(1000, quiet, quiet, slow, quiet, quiet, slow, quiet)
    found = [(int(line.split()[1].partition("/")[0]), remaining(line)) for line in printed]
    assert len(found) > 7
    for step, seconds in found:
        assert 0.95 <= (seconds + 1) / (0.1 * (1000 - step)) <= 1.25, found


MORE_WORKERS = "try --config.data.workers=8 (now {}; 8 CPU cores available)"
IN_USE = "all CPU cores (8) are in use; try {}a machine with more cores"
CACHE = "--config.data.cache=on if the decoded data fit in memory, or "
COPIES = "smaller copies of the videos (structvit prepare folder clips --transcode=256 --out=DIR), or "
FEWER = "fewer RandAugment operations (--config.augment.randaugment, now rand-m7-n4), or "
NOISE = {"data__name": "noise:9"}


@pytest.mark.parametrize(
    ("stage", "options", "advice"),
    [
        ("decode", {"data__workers": 2}, "(50%) on decoding; " + MORE_WORKERS.format(2)),
        ("open", NOISE, "on opening examples; " + MORE_WORKERS.format("threads")),
        ("open", NOISE | {"data__workers": 9}, IN_USE.format("")),
        ("decode", {"data__root": "clips"}, IN_USE.format(COPIES + CACHE)),
        ("convert", {"data__frames": 0}, "on converting frames to RGB; " + IN_USE.format(CACHE)),
        ("augment", {"augment__randaugment": "rand-m7-n4"}, IN_USE.format(FEWER)),
        ("crop", {"data__size": 64}, IN_USE.format("--config.data.short_side=96, or ")),
        ("crop", {"data__size": 64, "data__short_side": 96}, IN_USE.format("")),
        ("batch", {}, IN_USE.format("")),
    ],
)
def test_waiting_for_data_is_explained(run_log, tmp_path, stage, options, advice):
    printed = run_log(900, (800, 0.1, 0.02), (100, 0.1, 0.9), slowest=stage, **options)
    (note,) = notes_in(printed)
    assert note.startswith("note: steps waited for data ") and note.endswith(advice), note
    assert all(line.keys() == {"step", "loss", "top1", "lr", "grad_norm"} for line in records(tmp_path))


def test_the_wait_is_that_of_the_last_minute(run_log):
    """If it is still long after ten minutes, the note is repeated."""
    waiting, quick = (1.0, 0.8), (1.0, 0.2)  # seconds per step, and of these waiting
    assert not notes_in(run_log(59, (59, *waiting)))
    (note,) = notes_in(run_log(600, (600, *waiting)))
    assert "data 80% of the last minute" in note
    assert len(notes_in(run_log(700, (700, *waiting)))) == 2
    assert len(notes_in(run_log(700, (100, *waiting), (600, *quick)))) == 1
    (note,) = notes_in(run_log(400, (300, *quick), (100, *waiting)))
    assert 30 < int(note.partition("data ")[2].partition("%")[0]) <= 35


def test_a_short_wait_for_data_needs_no_advice(run_log):
    """The first batch waits for workers to start, which takes seconds."""
    printed = run_log(800, (1, 36.0, 35.0), (799, 0.1, 0.02))
    assert not notes_in(printed)
    assert "data-wait 20%" in printed[-1]


def test_a_wait_counts_only_while_the_devices_are_idle():
    clock = DeviceClock()
    began = time.monotonic()
    assert clock.idle(began) == pytest.approx(0, abs=0.1)  # nothing is dispatched: idle
    finished = threading.Event()
    clock.dispatched({"loss": types.SimpleNamespace(block_until_ready=finished.wait)})
    time.sleep(0.2)
    assert clock.idle(began) == 0
    finished.set()
    time.sleep(0.2)
    assert 0.05 < clock.idle(began) < time.monotonic() - began - 0.15
    clock.close()


def test_no_evaluation_right_before_the_final_one():
    """As in configs/digits.py: 449 steps, an evaluation every 112."""
    due = [step for step in range(1, 450) if evaluation_due(step, 112, 449)]
    assert due == [112, 224, 336]
    assert [step for step in range(1, 13) if evaluation_due(step, 6, 12)] == [6]
    assert [step for step in range(1, 5) if evaluation_due(step, 1, 4)] == [1, 2, 3]
    assert not any(evaluation_due(step, 0, 12) for step in range(1, 13))


# Accumulation, profile, memory


def test_accumulated_parts_equal_the_whole_batch():
    """Masked rows lie unevenly among the parts, and no example leaves its device."""
    config = small_config(name="deit_tiny_struct_1", widths=(16,), head_width=8, depths=(1,))
    config.model.drop_path, config.data.batch_size = 0.0, 32
    digits = data.load(config.data, config.augment)
    stream = digits.train_batches(32, start_step=0)
    batches = [next(stream) | {"mask": np.arange(32) % (7 + n) > n * 2} for n in range(3)]
    stream.close()
    results = {}
    for config.train.grad_accum_steps in (1, 4):
        grid, _, state, step_fn = setup(config, 4, 2)
        compiled = step_fn.lower(state, mesh.put_batch(grid, batches[0])).compile(COMPILED_SOON)
        losses = []
        for batch in batches:
            state, metrics = compiled(state, mesh.put_batch(grid, batch))
            losses.append([float(metrics[key]) for key in ("loss", "top1", "grad_norm")])
        results[config.train.grad_accum_steps] = losses, jax.device_get(state.weights.params)
    np.testing.assert_allclose(results[4][0], results[1][0], rtol=1e-5)
    chex.assert_trees_all_close(results[4][1], results[1][1], rtol=1e-5, atol=1e-5)
    text = compiled.as_text()
    assert "while" in text and "all-to-all" not in text and "collective-permute" not in text


def test_a_profile_of_some_steps(command, tmp_path):
    process = command(*QUICK, f"--workdir={tmp_path}", "--profile=3:5")
    assert process.returncode == 0, process.stderr
    assert f"profile of steps 3 to 4: {tmp_path}/profile" in process.stdout
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


MESSAGES = [  # of XLA on a GPU, a TPU and a CPU, and the requested size
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
def test_out_of_memory_names_the_keys_to_change(message, asked):
    with pytest.raises(UserError) as raised, learner.oom_as_user_error(default_config()):
        raise jax.errors.JaxRuntimeError(message)
    text = str(raised.value)
    assert text.startswith(f"out of memory: the program asked for {asked};") and "\n" not in text
    for word in (
        "config.data.batch_size (now 64)",
        "config.train.grad_accum_steps (now 1)",
        "config.model.remat",
    ):
        assert word in text


def test_a_real_out_of_memory_error():
    """Other errors pass unchanged."""
    with pytest.raises(UserError, match="out of memory: the program asked for"):  # noqa: SIM117
        with learner.oom_as_user_error(default_config()):
            jax.jit(lambda: jnp.zeros((2**40,), jnp.float32) + 1)().block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), learner.oom_as_user_error(default_config()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
