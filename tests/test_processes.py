"""Several processes of one run: they train as one does, one of them writes, and they end together."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from conftest import QUICK, ROOT, records

from structvit_jax import data
from structvit_jax.config import default_config
from structvit_jax.training import mesh
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.run import Run, starting_state

OPTIONS = [*QUICK, "--config.mesh.heartbeat=5", "--config.mesh.fsdp=4", "--config.data.batch_size=16"]


class Pair:
    """Two processes of four fake devices each, started by launch/local.sh."""

    def __init__(self, folder, *arguments):
        self._logs = folder / "logs"
        command = ["launch/local.sh", "--processes=2", "--cpu-devices=4", f"--logs={self._logs}", "--"]
        environment = os.environ | {"XLA_FLAGS": "", "PYTHON": sys.executable, "LOCAL_POLL_SECONDS": "0.1"}
        folder.mkdir(parents=True, exist_ok=True)
        self.out = (folder / "out").open("w+")
        self._process = subprocess.Popen(
            [*command, *map(str, arguments)], cwd=ROOT, env=environment, stdout=self.out, stderr=self.out
        )
        self.workdir = next(str(a).split("=", 1)[1] for a in arguments if str(a).startswith("--workdir="))

    def pid(self, number):
        """Of one of the two, by what it was started with."""
        for folder in os.listdir("/proc"):
            try:
                with open(f"/proc/{folder}/environ") as file:
                    mine = f"JAX_PROCESS_ID={number}\0" in file.read()
                with open(f"/proc/{folder}/cmdline") as file:
                    mine = mine and f"--workdir={self.workdir}\0" in file.read()
            except (OSError, ValueError):
                continue
            if mine:
                return int(folder)
        raise AssertionError(self.said())

    def when(self, happens, seconds=120):
        deadline = time.monotonic() + seconds
        while not happens():
            assert self._process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return self

    def wait(self):
        self._process.wait(200)
        return self

    @property
    def returncode(self):
        return self._process.returncode

    def said(self):
        """By the script and process 0; by process 1."""
        log = self._logs / "process-1.log"
        self.out.seek(0)
        return self.out.read(), log.read_text() if log.exists() else ""


def test_two_processes(command, tmp_path):
    """One story, since each start takes ten seconds: a whole run, and one with a signal and a kill."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    pair = Pair(tmp_path / "a", *OPTIONS, f"--workdir={whole}").wait()
    assert pair.returncode == 0, pair.said()
    one_process_writes_and_speaks(pair, whole)
    what_was_saved_is_restored_on_one_process(whole)

    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    alone = command(*OPTIONS, "--config.mesh.fsdp=1", f"--workdir={tmp_path / 'alone'}", **devices)
    assert alone.returncode == 0 and "devices: 8 x" in alone.stdout, alone.stderr
    paths = whole, tmp_path / "alone"
    losses = [[line["loss"] for line in records(path) if "loss" in line] for path in paths]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)

    pair = Pair(tmp_path / "b", *OPTIONS, f"--workdir={run}")
    pair.when(lambda: (run / "checkpoints" / "3").exists())
    os.kill(pair.pid(1), signal.SIGTERM)
    pair.wait()
    assert pair.returncode == 75 and "stopped by a signal after step" in pair.said()[0], pair.said()

    pair = Pair(tmp_path / "c", *OPTIONS, f"--workdir={run}")
    pair.when(lambda: "compiled in" in pair.said()[0])
    pid = pair.pid(1)
    os.kill(pid, signal.SIGKILL)
    pair.wait()
    assert pair.returncode == 75, pair.said()
    assert f"process 1 of 2 (host {os.uname().nodename}, pid {pid})" in pair.said()[0], pair.said()

    pair = Pair(tmp_path / "d", *OPTIONS, f"--workdir={run}").wait()
    assert pair.returncode == 0, pair.said()
    for name in ("result.json", "metrics.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def one_process_writes_and_speaks(pair, workdir):
    first, second = pair.said()
    assert "devices: 8 x cpu" in first and "in 2 processes" in first and "result: top1" in first
    assert "step" not in second and "result" not in second
    assert [line["step"] for line in records(workdir) if "loss" in line] == list(range(1, 13))
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def what_was_saved_is_restored_on_one_process(workdir):
    """On one device, two and four: equal bit for bit."""
    config = default_config()
    config.update(json.loads((workdir / "config.json").read_text()))
    restored = []
    for devices, config.mesh.fsdp in ((1, 1), (2, 2), (4, 2)):
        grid = mesh.make_mesh(-1, config.mesh.fsdp, jax.devices()[:devices])
        run = Run.prepare(config, data.load(config.data, config.augment), grid)
        with Checkpoints(workdir) as checkpoints:
            restored.append(jax.device_get(starting_state(run, checkpoints)))
    for other in restored[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, restored[0], other))
