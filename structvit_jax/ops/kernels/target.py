"""The device and the mesh for which a program is traced, from JAX's own context.

The device is that of `jax.set_mesh`, or else JAX's default device. Kernels are chosen for its platform.
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
    """The kind of device for which a program is traced."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # JAX's `device_kind`, such as "TPU v5 lite"


def current_device() -> Device:
    """Return the device of `jax.set_mesh`, or else JAX's default device."""
    device: Any = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if not getattr(device, "platform", ""):
        default: Any = jax.config.values["jax_default_device"]
        device = jax.devices(default)[0] if isinstance(default, str) else default or jax.devices()[0]
    return Device(device.platform, device.device_kind)


def on_own_examples(
    kernel: Callable[..., jax.Array], args: Sequence[jax.Array | None], options: dict[str, Any], batched: int
) -> Callable[[], jax.Array] | None:
    """Return a call in which every device runs a kernel on its own shard of the batch.

    The batch is split along the automatic axes of the mesh in JAX's context, and along the explicit axes by
    which the arrays are already sharded. Manual axes, inside `jax.shard_map`, are left alone.

    Args:
      kernel, args, options: the function and its arguments.
      batched: number of leading arguments with a batch axis. The other arguments are replicated. 0 if the
        compiler can split the kernel itself.

    Returns:
      A function without arguments, or None if the batch cannot be split evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    not_manual = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    if not batched or math.prod(mesh.shape[name] for name in not_manual) == 1:
        return functools.partial(kernel, *args, **options)
    axes = _batch_axes(kinds, args, batched)
    examples = args[0]
    assert examples is not None
    if axes is None or examples.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return None
    split, replicated = PartitionSpec(axes), PartitionSpec()
    on_each_device = jax.shard_map(
        functools.partial(kernel, **options),
        in_specs=tuple(split if i < batched else replicated for i in range(len(args))),
        out_specs=split,
        axis_names=not_manual,
        check_vma=False,
    )
    # Gradients of replicated arrays are summed over the devices, so these arrays become at least float32.
    return functools.partial(on_each_device, *args[:batched], *jax.tree.map(_widened, args[batched:]))


def _batch_axes(
    kinds: dict[str, AxisType], args: Sequence[jax.Array | None], batched: int
) -> tuple[str, ...] | None:
    """Return the mesh axes that split the batch, or None if the arrays are sharded in another way."""
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
    """Cast to float32, unless the dtype is wider."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
