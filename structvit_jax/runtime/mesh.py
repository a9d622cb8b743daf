"""The mesh of devices, and how batches, parameters and optimizer state are split over it.

Batches and activations are split by examples over all devices. Parameters and their optimizer state are split
over the fsdp axis, each array along the longest of its axes that is divisible. Small and indivisible arrays
are replicated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from structvit_jax.utils.errors import UserError

T = TypeVar("T")  # a tree of arrays
MESH_AXES = ("data", "fsdp")
_SMALLEST_SPLIT = 2**16  # bytes; smaller arrays are replicated


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the axes data and fsdp.

    Args:
      data, fsdp: number of devices along each axis; data = -1 takes all that fsdp leaves.
      devices: by default all devices of this run.

    Raises:
      UserError: the number of devices is not data * fsdp.
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of inputs, labels and activations: their first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a full copy of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, shapes: T) -> T:
    """Return a tree of shardings for weights and optimizer state, given a tree of arrays or their shapes."""
    ways = mesh.shape["fsdp"]

    def sharding(array: jax.Array) -> NamedSharding:
        axes = [axis for axis, length in enumerate(array.shape) if length % ways == 0]
        if ways == 1 or not axes or math.prod(array.shape) * array.dtype.itemsize < _SMALLEST_SPLIT:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, shapes)


def abstract(state: T, mesh: Mesh) -> T:
    """Return the shapes, dtypes and shardings of a state's arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_sharding(mesh, state)
    )


def put_batch(mesh: Mesh, batch: Mapping[str, object]) -> dict[str, jax.Array]:
    """Return the arrays of a batch as global arrays that are split over all devices.

    Args:
      mesh: the devices.
      batch: the rows that this process reads; values other than arrays are left out.
    """
    sharding = batch_sharding(mesh)
    arrays = {key: rows for key, rows in batch.items() if isinstance(rows, np.ndarray)}
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in arrays.items()}


def put_whole(arrays: T, shardings: object) -> T:
    """Place a tree of arrays by a tree of shardings; every process holds all values of the arrays."""

    def put(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        value = np.asarray(array)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, arrays, shardings)
