"""What a program is made for: operations take the form that suits it, and each device runs kernels alone."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)
_anywhere: contextvars.ContextVar[bool] = contextvars.ContextVar("anywhere", default=False)


@contextlib.contextmanager
def batch_split_over(mesh: Mesh) -> Iterator[None]:
    """Inside, operations are traced for the mesh's devices, with batches split over all its axes."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


@contextlib.contextmanager
def portable_lowering() -> Iterator[None]:
    """Inside, operations are traced for programs that are to run elsewhere, on any platform and without this
    package: they take forms in JAX alone."""
    token = _anywhere.set(True)
    try:
        yield
    finally:
        _anywhere.reset(token)


class Target(NamedTuple):
    """What an operation is traced for. Backward passes, which may be traced later, are handed it."""

    platform: str  # "cpu", "gpu", "tpu", or "any"
    mesh: Mesh | None  # of which all axes split batches; None is one device
    cudnn: bool = False  # whether cuDNN's attention runs there

    @property
    def interpret(self) -> bool:
        """Whether kernels for TPUs can only be interpreted."""
        return self.platform != "tpu"

    def on_each_device(self, kernel: Callable, *args: jax.Array, whole: int = 0):
        """Runs a kernel, which the compiler cannot split, with every device on its part of the batch.

        Args:
          kernel: takes arrays with a leading axis of examples, and returns such.
          *args: its arguments.
          whole: how many of these, the last, all devices get the whole of.
        """
        if self.mesh is None or self.mesh.size == 1:
            return kernel(*args)
        part, all_of_it = PartitionSpec(self.mesh.axis_names), PartitionSpec()
        specs = (part,) * (len(args) - whole) + (all_of_it,) * whole
        split = jax.shard_map(kernel, mesh=self.mesh, in_specs=specs, out_specs=part, check_vma=False)
        return split(*args)


def target() -> Target:
    """The devices of `batch_split_over`, or JAX's default; any within `running_anywhere`."""
    if _anywhere.get():
        return Target("any", None)
    mesh = _mesh.get()
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", "")  # "9.0"; AMD's are named otherwise
    ampere = bool(re.fullmatch(r"\d+\.\d", capability)) and float(capability) >= 8.0
    return Target(device.platform, mesh, cudnn=ampere)
