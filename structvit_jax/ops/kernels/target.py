"""The device and the mesh that a program is traced for, from JAX's own context.

The device is that of `jax.set_mesh`, or JAX's default device. This is the only place where the package asks
for the platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


class Device(NamedTuple):
    """The kind of device that is traced for."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # as "TPU v5 lite"


def current_device() -> Device:
    """Return the device of `jax.set_mesh`, or JAX's default device."""
    device: Any = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if not getattr(device, "platform", ""):
        default: Any = jax.config.values["jax_default_device"]
        device = jax.devices(default)[0] if isinstance(default, str) else default or jax.devices()[0]
    return Device(device.platform, device.device_kind)


def on_own_examples(
    kernel: Callable[..., jax.Array], args: Sequence[jax.Array | None], options: dict[str, Any], batched: int
) -> Callable[[], jax.Array] | None:
    """Return the call of a kernel by every device on its own examples, or None if these cannot be divided.

    The examples are divided along the automatic axes of the context's mesh, and along the explicit axes of
    the arrays' own sharding. Axes that are manual already, inside `jax.shard_map`, are left alone.

    Args:
      kernel, args, options: the function and its arguments.
      batched: how many arguments, the first ones, have a batch axis; every device gets the whole of the
        others. 0 if the compiler can divide the kernel itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    if not batched or math.prod(mesh.shape[name] for name in free) == 1:
        return functools.partial(kernel, *args, **options)
    axes = _batch_axes(kinds, args, batched)
    examples = args[0]
    assert examples is not None
    if axes is None or examples.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return None
    divided, whole = PartitionSpec(axes), PartitionSpec()
    on_each_device = jax.shard_map(
        functools.partial(kernel, **options),
        in_specs=tuple(divided if i < batched else whole for i in range(len(args))),
        out_specs=divided,
        axis_names=free,
        check_vma=False,
    )
    # gradients of shared arrays are summed over the devices, in float32 at least
    return functools.partial(on_each_device, *args[:batched], *jax.tree.map(_widened, args[batched:]))


def _batch_axes(
    kinds: dict[str, AxisType], args: Sequence[jax.Array | None], batched: int
) -> tuple[str, ...] | None:
    """Return the axes of the mesh that divide the batch; None where arrays are divided in another way."""
    automatic = tuple(name for name, kind in kinds.items() if kind == AxisType.Auto)
    explicit: set[tuple[str, ...]] = set()
    for i, array in enumerate(args):
        if array is not None and AxisType.Explicit in kinds.values():
            first, *others = jax.typeof(array).sharding.spec
            if any(others) or (i >= batched and first):
                return None
            if i < batched:
                explicit.add(first if isinstance(first, tuple) else (first,) if first else ())
    if len(explicit) > 1:
        return None
    return (*(explicit.pop() if explicit else ()), *automatic)


def _widened(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
