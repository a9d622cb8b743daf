"""Select the devices of a run and the cache of compiled programs, before JAX opens a device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

from structvit_jax.runtime import process
from structvit_jax.utils import user_cache
from structvit_jax.utils.errors import UserError


def select_devices(device: str) -> None:
    """Apply config.mesh.device. Call it before JAX opens a device.

    Raises:
      UserError: the device is not available. Or JAX would use the CPU although it was not requested and this
        machine has an NVIDIA GPU.
    """
    wants_cpu = device == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu"
    if wants_cpu or not (entry_points(group="jax_plugins") or find_spec("libtpu")):
        process.keep_freed_memory()
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    try:
        platform, reason = jax.devices()[0].platform, ""
    except (RuntimeError, AssertionError) as error:  # JAX raises AssertionError if it has no GPU plug-in
        platform, reason = "none", " ".join(str(error).split()) or "its plug-in is not installed"
    if platform in ("cpu", "none") and not wants_cpu and _has_nvidia_gpu():
        raise UserError(
            "there is an NVIDIA GPU that JAX does not see: pip install -U 'jax[cuda13]' (drivers before"
            " 580: 'jax[cuda12]'), or choose the CPU with --config.mesh.device=cpu"
        )
    if platform == "none":
        raise UserError(f"JAX finds no device for config.mesh.device={device!r}: {reason}")


def _has_nvidia_gpu() -> bool:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def use_compilation_cache(folder: str) -> None:
    """Apply config.mesh.compilation_cache, the folder where compiled programs are cached for later runs.

    JAX does not verify the programs that it loads from the cache. So "auto" is the folder in the environment
    variable JAX_COMPILATION_CACHE_DIR, or else a folder that only this user can write. If there is neither,
    nothing is cached.
    """
    if folder == "auto" and not (folder := os.environ.get("JAX_COMPILATION_CACHE_DIR", "")):
        private, problem = user_cache.user_folder("compiled")
        folder = str(private or "")
        if problem:
            print(f"note: {problem}; compiled programs are not cached", file=sys.stderr, flush=True)
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)


def describe_devices() -> str:
    """Describe the devices, the number of processes and JAX's version in one line."""
    devices, processes = jax.devices(), jax.process_count()
    several = f" in {processes} processes" if processes > 1 else ""
    return (
        f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){several}, jax {jax.__version__}"
    )
