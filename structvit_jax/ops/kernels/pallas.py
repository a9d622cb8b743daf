"""Helpers for Pallas kernels on TPUs. `call_kernel` reserves only the vector memory that a kernel needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from structvit_jax.ops.kernels.target import current_device

Ref = Any  # a reference to a block in memory, inside a kernel
F = TypeVar("F", bound=Callable[..., Any])

_LIMIT = 96 * 2**20  # bytes of vector memory for a kernel; v5e, v5p and v6e have 128 MB
_RESERVE = 4 * 2**20  # for the compiler's own use


def interpreted_elsewhere(make: Callable[[bool], F]) -> F:
    """Return a kernel that is compiled on TPUs and interpreted on other platforms.

    Args:
      make: called with True to build the interpreted kernel, with False to build the compiled one.
    """
    compiled, interpreted = make(False), make(True)

    @functools.wraps(compiled)
    def run(*args: Any, **options: Any) -> Any:
        return (compiled if current_device().platform == "tpu" else interpreted)(*args, **options)

    return cast(F, run)


def call_kernel(
    kernel: Callable,
    operands: Sequence[jax.Array],
    *,
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch_shapes: Sequence[Any] = (),
    semantics: Sequence[Any],
    work: int,
    **options: Any,
) -> Any:
    """Call a kernel on its operands with `pl.pallas_call`.

    Vector memory that a kernel reserves is not available to the compiler for keeping other arrays between
    operations. When every kernel reserved 64 to 96 MB, a train step of StructViT-S moved 1.5 times the bytes.

    Args:
      semantics: "parallel" or "arbitrary", one per axis of the grid.
      work: bytes of the intermediate results of one grid step.
      kernel, operands, **options: see `pl.pallas_call`, also for the arguments that are not listed here.
    """
    dtypes = [*(array.dtype for array in operands), *(array.dtype for array in out_shape)]
    blocks = zip((*in_specs, *out_specs), dtypes, strict=True)
    # Blocks are double-buffered: one copy is used while the other is transferred.
    memory = sum(2 * _bytes(spec.block_shape, dtype) for spec, dtype in blocks)
    memory += sum(_bytes(scratch.shape, scratch.dtype) for scratch in scratch_shapes)
    return pl.pallas_call(
        kernel,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=min(_LIMIT, memory + work + _RESERVE)
        ),
        **options,
    )(*operands)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Multiply matrices inside a kernel, contracting the given axes; return float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, ((axes[:1], axes[1:]), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _bytes(shape: Any, dtype: Any) -> int:
    """Return the bytes of an array padded to whole tiles: 128 lanes, and 32 bytes along the sublanes."""
    size = np.dtype(dtype).itemsize
    sublanes = 32 // size
    rows, lanes = -(-shape[-2] // sublanes) * sublanes, -(-shape[-1] // 128) * 128
    return math.prod(shape[:-2]) * rows * lanes * size
