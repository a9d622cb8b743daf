"""Devices: which are used, how they form a mesh, and how a batch comes onto them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from platform import libc_ver
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from structvit_jax.runtime import cache
from structvit_jax.runtime.sharding import batch_sharding
from structvit_jax.utils.errors import UserError

MESH_AXES = ("data", "fsdp")


def select_devices(device: str) -> None:
    """Apply config.mesh.device, before JAX opens any.

    Raises:
      UserError: the device is not available, or there is an NVIDIA GPU that JAX does not see and the CPU
        was not asked for.
    """
    wants_cpu = device == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu"
    if wants_cpu or not (entry_points(group="jax_plugins") or find_spec("libtpu")):  # nothing else is there
        _keep_freed_memory()
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    try:
        platform, reason = jax.devices()[0].platform, ""
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX without a plug-in for GPUs
        platform, reason = "none", " ".join(str(error).split()) or "its plug-in is not installed"
    if platform in ("cpu", "none") and not wants_cpu and _nvidia_gpu():
        raise UserError(
            "there is an NVIDIA GPU that JAX does not see: pip install -U 'jax[cuda13]' (drivers before"
            " 580: 'jax[cuda12]'), or choose the CPU with --config.mesh.device=cpu"
        )
    if platform == "none":
        raise UserError(f"JAX finds no device for config.mesh.device={device!r}: {reason}")


def _keep_freed_memory() -> None:
    """Has glibc's allocator keep what arrays in this machine's memory leave, and take it in large pages. As
    it comes, it gives large blocks back at once, and every step of a training on CPUs asks for them again,
    page by small page. JAX's threads keep the allocator that they find when they start."""
    if libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max, m_arena_max, madv_hugepage = -1, -4, -8, 14  # of its headers
    libc, page = ctypes.CDLL(None), 2**21
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, -1)):
        libc.mallopt(option, value)
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)  # of addresses: untouched, it takes no memory
    if block:
        first = -(-block // page) * page
        libc.madvise(first, (block + size - first) // page * page, madv_hugepage)
        libc.free(block)


def _nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def use_compilation_cache(folder: str) -> None:
    """Apply config.mesh.compilation_cache, from which later runs read what was compiled once.

    Programs in it run without any check. So "auto" is a folder that only this user can write, or the one that
    JAX_COMPILATION_CACHE_DIR names; where there is no such folder, nothing is kept.
    """
    if folder == "auto" and not (folder := os.environ.get("JAX_COMPILATION_CACHE_DIR", "")):
        private, problem = cache.user_folder("compiled")
        folder = str(private or "")
        if problem:
            print(f"note: {problem}; compiled programs are not kept", file=sys.stderr, flush=True)
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)


def describe_devices() -> str:
    """How many devices of which kind, in how many processes."""
    devices, processes = jax.devices(), jax.process_count()
    several = f" in {processes} processes" if processes > 1 else ""
    return (
        f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){several}, jax {jax.__version__}"
    )


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (all, by default) with axes data and fsdp; data = -1 takes what fsdp leaves."""
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % fsdp:
        raise UserError(f"config.mesh.fsdp is {fsdp}, which does not divide {len(devices)} devices")
    data = len(devices) // fsdp if data == -1 else data
    if data * fsdp != len(devices):
        raise UserError(f"config.mesh asks for data={data} x fsdp={fsdp} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def fitting_batch(mesh: Mesh, batch_size: int, examples: int) -> int:
    """Return the batch size for so many examples: no larger than needed, in equal parts for all devices."""
    return -(-max(1, min(batch_size, examples)) // mesh.size) * mesh.size


def check_batch(mesh: Mesh, key: str, batch_size: int, parts: int = 1) -> None:
    """Raises UserError where devices, or `parts` of a batch on each device, would be unequal."""
    least = mesh.size * parts
    if batch_size % least:
        near = max(least, round(batch_size / least) * least)
        takers = f"{mesh.size} devices" + (f" in {parts} parts" if parts > 1 else "")
        raise UserError(f"config.{key} is {batch_size}, which {takers} cannot share equally; {near} would do")


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the device needs of a batch, split over all devices; every process brings its share."""
    sharding = batch_sharding(mesh)
    arrays = {key: rows for key, rows in batch.items() if isinstance(rows, np.ndarray)}
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in arrays.items()}


def put_whole(arrays: Any, shardings: Any) -> Any:
    """Places arrays of which every process has the whole."""

    def put(array, sharding):
        value = np.asarray(array)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, arrays, shardings)
