"""Helpers of the Pallas kernels for TPUs: calls that reserve as much vector memory as needed, no more."""

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
      make: returns the kernel, given whether it is interpreted.
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
    """Call `pl.pallas_call` of a kernel on its operands.

    The compiler cannot use vector memory that a kernel reserves to keep arrays between operations. With 64 to
    96 MB for every kernel, a train step of StructViT-S moved 1.5 times the bytes (docs/speed.md).

    Args:
      semantics: of the grid's axes, "parallel" or "arbitrary".
      work: bytes of a step's intermediate results.
      kernel, operands, **options: as for `pl.pallas_call`, like the arguments not listed here.
    """
    dtypes = [*(array.dtype for array in operands), *(array.dtype for array in out_shape)]
    blocks = zip((*in_specs, *out_specs), dtypes, strict=True)
    # Every block is in memory twice: one copy is in use while the other is read or written.
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
    """Multiply matrices inside a kernel, contracting these axes, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, ((axes[:1], axes[1:]), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _bytes(shape: Any, dtype: Any) -> int:
    """Return the size, padded to whole registers: 128 lanes by the sublanes that make 32 bytes."""
    size = np.dtype(dtype).itemsize
    sublanes = 32 // size
    rows, lanes = -(-shape[-2] // sublanes) * sublanes, -(-shape[-1] // 128) * 128
    return math.prod(shape[:-2]) * rows * lanes * size
