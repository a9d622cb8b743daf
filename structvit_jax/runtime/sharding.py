"""Sharding rules: one table from the names of arrays to logical axes, one from these to the mesh.

Batches and activations are split by examples over all devices. Parameters and their optimizer state are split
over the fsdp axis: along the longest axis that a rule splits and whose length is divisible. Everything else
(batch statistics, counters, small or indivisible arrays) is replicated.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")  # a tree of arrays

# Logical axis -> the axes of the mesh that it is split over.
RULES: dict[str, tuple[str, ...]] = {
    "examples": ("data", "fsdp"),
    "inputs": ("fsdp",),  # channels that a layer reads
    "outputs": ("fsdp",),  # channels that it writes
    "heads": ("fsdp",),
    "channels": ("fsdp",),  # of a position, or of one head
    "patterns": (),  # the D of StructSA
    "window": (),
    "grid": (),
}

# End of a parameter's name -> its last logical axes; axes before these belong to a window.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(depthwise|blocks\d*\.\d+\.pos_embed)\.kernel", ("window", "channels")),
    (r"(key|value)_kernels", ("heads", "channels", "patterns")),
    (r"pos_embed", ("grid", "channels")),
    (r"kernel", ("inputs", "outputs")),
    (r"bias|scale|gamma_[12]", ("channels",)),
)
ACTIVATIONS = ("examples",)  # their first axis
_SMALLEST_SPLIT = 2**16  # bytes; smaller arrays are replicated


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of inputs, labels and activations: [examples, ...]."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in ACTIVATIONS)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def axes_of(name: str, rank: int) -> tuple[str, ...]:
    """Return the logical axes of a parameter by its name; () if no row of the table matches."""
    for pattern, axes in AXES:
        if re.search(rf"(^|\.)({pattern})$", name):
            return ("window",) * (rank - len(axes)) + axes[-rank:]
    return ()


def state_sharding(mesh: Mesh, shapes: T) -> T:
    """Return a tree of shardings for weights, statistics and optimizer state, given arrays or shapes."""

    def place(path: tuple[Any, ...], array: jax.Array) -> NamedSharding:
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        axes = axes_of(names[-1], array.ndim) if names else ()
        ways = mesh.shape["fsdp"]
        split = [i for i, axis in enumerate(axes) if "fsdp" in RULES[axis] and array.shape[i] % ways == 0]
        if ways == 1 or not split or math.prod(array.shape) * array.dtype.itemsize < _SMALLEST_SPLIT:
            return replicated(mesh)
        longest = max(split, key=lambda i: array.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def abstract(state: T, mesh: Mesh) -> T:
    """Return the shapes, dtypes and shardings of a state's arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_sharding(mesh, state)
    )
