"""The mesh of devices, and how batches, parameters and optimizer state are split over it.

Batches and activations are split over all devices, along the axis of examples. Parameters and their optimizer
state are split over the fsdp axis of the mesh. Each array is split along the longest of its axes whose length
is divisible by the size of fsdp. Small arrays, and arrays without such an axis, are replicated.
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
_MIN_SPLIT_BYTES = 2**16  # smaller arrays are replicated


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the axes data and fsdp.

    Args:
      data, fsdp: number of devices along each axis; data = -1 is the number of devices divided by fsdp.
      devices: by default all devices of this run.

    Raises:
      UserError: the number of devices is not data * fsdp, or is not divisible by fsdp if data is -1.
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
    """Return the smallest multiple of the number of devices that is at least min(batch_size, examples)."""
    return -(-max(1, min(batch_size, examples)) // mesh.size) * mesh.size


def check_batch(mesh: Mesh, key: str, batch_size: int, parts: int = 1) -> None:
    """Raise UserError unless a batch can be cut into `parts` equal parts on every device."""
    least = mesh.size * parts
    if batch_size % least:
        near = max(least, round(batch_size / least) * least)
        divisor = f"{mesh.size} devices" + (f" in {parts} parts" if parts > 1 else "")
        raise UserError(f"config.{key} is {batch_size}, not divisible by {divisor}; try {near}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of inputs, labels and activations: the first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a full copy of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, shapes: T) -> T:
    """Return the shardings for a tree of weights or optimizer state (arrays or their shapes)."""
    fsdp = mesh.shape["fsdp"]

    def sharding(array: jax.Array) -> NamedSharding:
        axes = [axis for axis, length in enumerate(array.shape) if length % fsdp == 0]
        if fsdp == 1 or not axes or math.prod(array.shape) * array.dtype.itemsize < _MIN_SPLIT_BYTES:
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
    """Return the arrays of a batch as global arrays, split over all devices.

    Args:
      mesh: the devices.
      batch: the rows that this process has read; values that are not arrays are left out.
    """
    sharding = batch_sharding(mesh)
    arrays = {key: rows for key, rows in batch.items() if isinstance(rows, np.ndarray)}
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in arrays.items()}


def put_whole(arrays: T, shardings: object) -> T:
    """Return a tree of arrays as global arrays with the given shardings.

    Every process must pass the whole arrays, with the same values.
    """

    def put(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        value = np.asarray(array)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, arrays, shardings)
