"""Data workers: ordered results, deaths, signals, process-wide settings, and nothing left behind."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from structvit_jax.config import default_config
from structvit_jax.data import pipeline
from structvit_jax.data.media import configure_decoding
from structvit_jax.data.types import DataOptions
from structvit_jax.data.workers import in_processes

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import the tests


def arrays(number, note):
    return {"large": np.full((300, 301), number), "empty": np.zeros(0), "text": f"number {number}"}


def deadly(number, note):
    note(f"example {number}")
    if number in (3, 4, 8):
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def failing(number, note):
    class OddError(Exception):
        """A local class, which no other process can load."""

    if number == 2:
        raise OddError("a b")
    return number


def ending(number, note):
    raise EOFError("the file ends")


def blocked(number, note):
    return Path("/proc/self/status").read_text()


def settings(number, note):
    return cv2.getNumThreads(), Image.MAX_IMAGE_PIXELS


def unexpected(worker):
    raise AssertionError(worker)


def test_a_process_per_core_reads_files(monkeypatch):
    """Threads read what processes would not read faster."""
    monkeypatch.setattr(pipeline, "available_cores", lambda: 8)
    options = DataOptions.from_config(default_config().data)
    assert options.workers == -1 and pipeline.worker_count(options) == 0  # generated
    for name in ("folder", "tfds:x"):
        files = dataclasses.replace(options, name=name)
        counts = [pipeline.worker_count(files, batches) for batches in (1, 2, 3, 9)]
        assert counts == [0, 0, 3, 8] and pipeline.worker_count(files) == 8
    assert pipeline.worker_count(dataclasses.replace(files, workers=5), 1) == 5
    monkeypatch.setattr(pipeline, "available_cores", lambda: 400)
    assert pipeline.worker_count(files) == 32


def test_results_are_in_order_and_arrays_are_writable():
    with contextlib.closing(in_processes(arrays, range(5, 12), 3, ahead=2, on_death=unexpected)) as results:
        kept = list(results)
    for number, result in enumerate(kept, 5):
        assert result["text"] == f"number {number}" and result["empty"].shape == (0,)
        assert (result["large"] == number).all() and result["large"].shape == (300, 301)
        assert result["large"].ctypes.data % 64 == 0
        result["large"] += 1


def test_a_dead_worker_is_replaced_and_reported():
    lost = []
    with contextlib.closing(in_processes(deadly, range(10), 2, ahead=3, on_death=lost.append)) as results:
        assert list(results) == [0, 1, 2, None, None, 5, 6, 7, None, 9]
    assert [(worker.code, worker.note) for worker in lost] == [
        (-signal.SIGKILL, f"example {number}") for number in (3, 4, 8)
    ]


def test_an_exception_is_raised_with_its_traceback():
    with contextlib.closing(in_processes(failing, range(5), 2, ahead=2, on_death=unexpected)) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(RuntimeError, match="OddError: a b") as caught:
            next(results)
    assert "in failing" in caught.value.__notes__[0]


def test_an_end_of_file_is_not_taken_for_a_dead_worker():
    with pytest.raises(EOFError, match="the file ends"):
        next(in_processes(ending, [0], 1, ahead=1, on_death=unexpected))


def test_workers_block_signals_to_the_process_group():
    (status,) = in_processes(blocked, [0], 1, ahead=1, on_death=unexpected)
    mask = int(status.split("SigBlk:")[1].split()[0], 16)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert mask >> number - 1 & 1
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_apply_the_settings_of_decoders():
    results = in_processes(settings, [0], 1, ahead=1, on_death=unexpected, setup=configure_decoding)
    assert list(results) == [(1, None)]


PARENT = """
import os, time
from structvit_jax.data.workers import in_processes

def work(number, note):
    if number < 2:
        return os.getpid()
    time.sleep(100)

results = in_processes(work, range(9), 2, ahead=2, on_death=None)
print(next(results), next(results), flush=True)
time.sleep(100)
"""


def test_workers_exit_when_their_parent_is_killed(tmp_path):
    command, environment = [sys.executable, "-c", PARENT], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (parent.pid, *workers)]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not any("/dev/shm" in line for lines in maps for line in lines.splitlines())
    assert not list(tmp_path.iterdir())
