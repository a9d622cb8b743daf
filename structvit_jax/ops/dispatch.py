"""Choose what runs for an operation: its definition, or a kernel of `structvit_jax.ops.kernels`.

The devices are those of JAX's own context: of `jax.set_mesh`, or JAX's default device. This is the only place
where the package asks for the platform.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from structvit_jax.utils.errors import check_choice

KERNELS = ("auto", "reference", "portable")
P = ParamSpec("P")
R = TypeVar("R")

DEFINITIONS: dict[str, Callable[..., Any]] = {}  # of all operations, by name
_kernels = jax.make_user_context("auto")  # part of jax.jit's key: functions are traced again when it changes


@contextlib.contextmanager
def use_kernels(kernels: str) -> Iterator[None]:
    """Set what runs for the operations that are traced inside the block.

    Args:
      kernels: "auto" takes the fastest kernel for the platform, types and shapes; "reference" takes the
        definitions, in plain JAX, everywhere; "portable" takes implementations in JAX alone that compile for
        every platform, for programs that are exported.

    Raises:
      UserError: another value.
    """
    with _kernels(check_choice("kernels", kernels, KERNELS)):
        yield


class Operation(Protocol[P, R]):  # type: ignore[misc]  # R is the result of an attribute, too
    """An operation: calls run a kernel or the definition."""

    definition: Callable[P, R]
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def operation(*, check: Callable[..., None] | None = None) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorate the definition of an operation.

    Its positional arguments are arrays or None, the first with a leading batch axis; all else is passed by
    keyword.

    Args:
      check: takes the same arguments and raises ValueError, in one line, for those that do not fit.
    """

    def decorate(definition: Callable[P, R]) -> Operation[P, R]:
        name, signature = definition.__name__, inspect.signature(definition)
        DEFINITIONS[name] = definition

        @functools.wraps(definition)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arrays = [array if array is None else jnp.asarray(array) for array in bound.args]
            if check:
                check(*arrays, **bound.kwargs)
            return _choose(name, arrays, bound.kwargs)(*arrays, **bound.kwargs)

        call.definition = definition  # type: ignore[attr-defined]
        return cast(Operation[P, R], call)

    return decorate


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


def _choose(name: str, args: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return the first kernel of the table that fits, or the definition."""
    kernels = _kernels.value
    if kernels == "reference":
        return DEFINITIONS[name]
    table = importlib.import_module("structvit_jax.ops.kernels")
    device = current_device()
    platform = "portable" if kernels == "portable" else device.platform
    for kernel in table.find(name, platform):
        if not kernel.supports(*args, **options):
            continue
        split = _split(args, kernel.batched)
        if split is not None and table.trusted(kernel, args[0].dtype, device):
            return split(kernel.run)
    return DEFINITIONS[name]


def _split(args: Sequence[Any], batched: int) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Return what runs a kernel on every device's own examples, or None if these cannot be divided.

    The axes of the context's mesh that split the batch are all automatic ones, and the explicit ones of the
    arrays' own sharding. Axes that are manual already, inside `jax.shard_map`, are left alone.

    Args:
      batched: number of arguments, the first, with a batch axis; all devices get the whole of the others.
        0 if the compiler can split the kernel itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in _axis_types(mesh).items() if kind != AxisType.Manual}
    if not batched or math.prod(mesh.shape[name] for name in free) == 1:
        return lambda kernel: kernel
    axes = _batch_axes(mesh, args, batched)
    if axes is None or args[0].shape[0] % math.prod(mesh.shape[name] for name in axes):
        return None
    examples, whole = PartitionSpec(axes), PartitionSpec()
    specs = tuple(examples if i < batched else whole for i in range(len(args)))

    def on_each_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            # gradients of shared arrays are summed over the devices, in float32 at least
            args = *args[:batched], *jax.tree.map(_widen, args[batched:])
            function = functools.partial(kernel, **options)
            return jax.shard_map(
                function, in_specs=specs, out_specs=examples, axis_names=free, check_vma=False
            )(*args)

        return run

    return on_each_device


def _axis_types(mesh: AbstractMesh) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _batch_axes(mesh: AbstractMesh, args: Sequence[Any], batched: int) -> tuple[str, ...] | None:
    """Return the axes that split the batch; None where arrays are split in another way."""
    types = _axis_types(mesh)
    automatic = tuple(name for name, kind in types.items() if kind == AxisType.Auto)
    explicit: set[Any] = set()
    for i, array in enumerate(args):
        if array is not None and AxisType.Explicit in types.values():
            first, *others = jax.typeof(array).sharding.spec
            if any(others) or (i >= batched and first):
                return None
            if i < batched:
                explicit.add(first if isinstance(first, tuple) else (first,) if first else ())
    if len(explicit) > 1:
        return None
    return (*(explicit.pop() if explicit else ()), *automatic)


def _widen(weights: jax.Array) -> jax.Array:
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
