"""CPU cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_processes = 1  # processes that share the cores, see `share_cores`


def available_cores(root: Path = Path("/")) -> int:
    """Return how many CPU cores this process may use; at least 1.

    The limits are its CPU affinity, the CPU quota of its control group (containers, SLURM, Kubernetes), and
    the number of processes given to `share_cores`.

    Args:
      root: root of the file system.
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(int(min([len(affinity), *_quotas(root)]) / _processes), 1)


def share_cores(processes: int) -> None:
    """Divide the cores among this number of processes, which run on this host and may use the same cores."""
    global _processes
    _processes = processes


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of the control group of this process and of the groups above it."""
    groups = root / "sys/fs/cgroup"
    yield from _ratio(f"{_read(groups / 'cpu/cpu.cfs_quota_us')} {_read(groups / 'cpu/cpu.cfs_period_us')}")
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/"):  # version 2
            own = groups / line.removeprefix("0::/")
            for group in (own, *own.parents):
                yield from _ratio(_read(group / "cpu.max"))


def _ratio(text: str) -> Iterator[float]:
    """Yield QUOTA / PERIOD for the text "QUOTA PERIOD"; nothing if there is no quota."""
    quota, _, period = text.strip().partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
