"""The number of CPU cores that a process may use."""

import os

import pytest

from structvit_jax.utils import cores


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/pod/own\n", "sys/fs/cgroup/pod/own/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/pod/own\n", "sys/fs/cgroup/pod/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores_of_a_control_group(eight_cores, tmp_path, files, count):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.available_cores(tmp_path) == count


def test_processes_share_the_cores(eight_cores, monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "_processes", 1)
    for processes, count in ((1, 8), (3, 2), (20, 1)):
        cores.share_cores(processes)
        assert cores.available_cores(tmp_path) == count
