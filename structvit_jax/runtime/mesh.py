"""The mesh of devices, and the placement of batches and weights on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from structvit_jax.runtime.sharding import batch_sharding
from structvit_jax.utils.errors import UserError

T = TypeVar("T")
MESH_AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the axes data and fsdp.

    Args:
      data, fsdp: devices along each axis; data = -1 takes all that fsdp leaves.
      devices: all of this run, by default.

    Raises:
      UserError: the devices cannot be arranged in this way.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % fsdp:
        raise UserError(f"config.mesh.fsdp is {fsdp}, which does not divide {len(devices)} devices")
    data = len(devices) // fsdp if data == -1 else data
    if data * fsdp != len(devices):
        raise UserError(f"config.mesh asks for data={data} x fsdp={fsdp} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def single_device_mesh() -> Mesh:
    """Return a mesh of the first device alone."""
    return make_mesh(1, 1, jax.devices()[:1])


def fitting_batch(mesh: Mesh, batch_size: int, examples: int) -> int:
    """Return the smallest multiple of the number of devices that holds min(batch_size, examples) rows."""
    return -(-max(1, min(batch_size, examples)) // mesh.size) * mesh.size


def check_batch(mesh: Mesh, key: str, batch_size: int, parts: int = 1) -> None:
    """Raise UserError unless a batch can be cut into `parts` equal parts on every device."""
    least = mesh.size * parts
    if batch_size % least:
        near = max(least, round(batch_size / least) * least)
        divisor = f"{mesh.size} devices" + (f" in {parts} parts" if parts > 1 else "")
        raise UserError(f"config.{key} is {batch_size}, not divisible by {divisor}; try {near}")


def put_batch(mesh: Mesh, batch: Mapping[str, object]) -> dict[str, jax.Array]:
    """Return the arrays of a batch as global arrays, split over all devices.

    Args:
      mesh: the devices.
      batch: the rows that this process reads; values that are no arrays are left out.
    """
    sharding = batch_sharding(mesh)
    arrays = {key: rows for key, rows in batch.items() if isinstance(rows, np.ndarray)}
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in arrays.items()}


def put_whole(arrays: T, shardings: object) -> T:
    """Place a tree of arrays, of which every process holds all values, in a tree of shardings."""

    def put(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        value = np.asarray(array)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, arrays, shardings)
