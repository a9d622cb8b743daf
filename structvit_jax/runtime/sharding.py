"""What lies where: one table from an array's name to what its axes mean, one from that to the mesh.

Batches and activations are split by examples over all devices. Parameters, and the optimizer state that
follows them, are split over the fsdp axis: of an array's axes that a rule splits, the longest that divides.
All else (batch statistics, counters, small or odd arrays) is whole on every device.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What an axis means -> the axes of the mesh that it is split over.
RULES: dict[str, tuple[str, ...]] = {
    "examples": ("data", "fsdp"),
    "inputs": ("fsdp",),  # channels that a layer reads
    "outputs": ("fsdp",),  # channels that it makes
    "heads": ("fsdp",),
    "channels": ("fsdp",),  # of a position, or of one head
    "patterns": (),  # the D of StructSA
    "window": (),
    "grid": (),
}

# Ends of parameters' names -> what their last axes mean; axes before these are a window's.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(depthwise|blocks\d*\.\d+\.pos_embed)\.kernel", ("window", "channels")),
    (r"(key|value)_kernels", ("heads", "channels", "patterns")),
    (r"pos_embed", ("grid", "channels")),
    (r"kernel", ("inputs", "outputs")),
    (r"bias|scale|gamma_[12]", ("channels",)),
)
ACTIVATIONS = ("examples",)  # of their axes, the first
_SMALLEST_SPLIT = 2**16  # bytes; smaller arrays stay whole


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of inputs, labels and activations: [examples, ...]."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in ACTIVATIONS)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def axes_of(name: str, rank: int) -> tuple[str, ...]:
    """What the axes of a parameter mean, by its name; empty for what no row of the table names."""
    for pattern, axes in AXES:
        if re.search(rf"(^|\.)({pattern})$", name):
            return ("window",) * (rank - len(axes)) + axes[-rank:]
    return ()


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """A sharding for every array of weights, statistics or optimizer state, given the arrays or shapes."""

    def place(path, array):
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        axes = axes_of(names[-1], array.ndim) if names else ()
        ways = mesh.shape["fsdp"]
        split = [i for i, axis in enumerate(axes) if "fsdp" in RULES[axis] and array.shape[i] % ways == 0]
        if ways == 1 or not split or math.prod(array.shape) * array.dtype.itemsize < _SMALLEST_SPLIT:
            return replicated(mesh)
        longest = max(split, key=lambda i: array.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def abstract(state: Any, mesh: Mesh) -> Any:
    """Shapes, types and places of a state's arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_sharding(mesh, state)
    )
