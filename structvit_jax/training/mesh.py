"""Devices: which are used, how they form a mesh, and what lies where."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from structvit_jax.errors import UserError

AXES = ("data", "fsdp")
_SMALLEST_SPLIT = 2**14  # arrays with fewer elements (64 kB of float32) stay whole on every device


def select_devices(device: str) -> None:
    """Applies config.mesh.device, before JAX opens any.

    Raises:
      UserError: the device is not there, or there is an NVIDIA GPU that JAX does not see and the CPU
        was not asked for.
    """
    wants_cpu = device == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu"
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    try:
        platform, reason = jax.devices()[0].platform, ""
    except RuntimeError as error:
        platform, reason = "none", " ".join(str(error).split())
    if platform in ("cpu", "none") and not wants_cpu and _nvidia_gpu():
        raise UserError(
            "there is an NVIDIA GPU that JAX does not see: pip install -U 'jax[cuda13]' (drivers before"
            " 580: 'jax[cuda12]'), or choose the CPU with --config.mesh.device=cpu"
        )
    if platform == "none":
        raise UserError(f"JAX finds no device for config.mesh.device={device!r}: {reason}")


def _nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def describe_devices() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), jax {jax.__version__}"


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (all, by default) with axes data and fsdp; data = -1 takes what fsdp leaves."""
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % fsdp:
        raise UserError(f"config.mesh.fsdp is {fsdp}, which does not divide {len(devices)} devices")
    data = len(devices) // fsdp if data == -1 else data
    if data * fsdp != len(devices):
        raise UserError(f"config.mesh asks for data={data} x fsdp={fsdp} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(mesh: Mesh, key: str, batch_size: int) -> None:
    if batch_size % mesh.size:
        near = max(mesh.size, round(batch_size / mesh.size) * mesh.size)
        raise UserError(
            f"config.{key} is {batch_size}, which {mesh.size} devices cannot share equally; {near} would do"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """For every array of parameters, statistics and optimizer state: large ones are split over fsdp
    along their longest axis that divides, all others are replicated."""

    def place(array):
        axes = [axis for axis, n in enumerate(array.shape) if n % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] == 1 or not axes or math.prod(array.shape) < _SMALLEST_SPLIT:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(place, shapes)


def own_share() -> tuple[int, int]:
    """This process's number and how many there are: the share of every batch that it reads."""
    return jax.process_index(), jax.process_count()


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the device needs of a batch, split over all devices; every process brings its share."""
    sharding = batch_sharding(mesh)
    keys = ("inputs", "labels", "mask", "index")
    return {key: jax.make_array_from_process_local_data(sharding, batch[key]) for key in keys}
