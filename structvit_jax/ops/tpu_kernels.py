"""How kernels for TPUs are called: with as much vector memory as they need and no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_MOST = 96 * 2**20  # bytes of vector memory that a kernel may have; v5e, v5p and v6e have 128 MB
_SPARE = 4 * 2**20  # for what the compiler keeps


def call_kernel(
    kernel: Callable,
    operands: Sequence[jax.Array],
    *,
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    scratch_shapes: Sequence[Any] = (),
    semantics: Sequence[Any],
    work: int,
    **options: Any,
) -> Any:
    """`pl.pallas_call` of a kernel on its operands.

    What a kernel asks for, the compiler cannot use to keep arrays from one operation to the next. With 64 to
    96 MB for every kernel a train step of StructViT-S moved half as many bytes again (docs/SPEED.md).

    Args:
      semantics: of the grid's axes, "parallel" or "arbitrary".
      work: bytes of what a step computes on the way from blocks to blocks.
      others: as for `pl.pallas_call`.
    """
    outs = out_shape if isinstance(out_shape, (list, tuple)) else [out_shape]
    specs = out_specs if isinstance(out_specs, (list, tuple)) else [out_specs]
    blocks = [*zip(in_specs, operands, strict=True), *zip(specs, outs, strict=True)]
    # A block is in memory twice: one is computed with while the other comes or goes.
    room = sum(2 * _bytes(spec.block_shape, array.dtype) for spec, array in blocks)
    room += sum(_bytes(scratch.shape, scratch.dtype) for scratch in scratch_shapes)
    return pl.pallas_call(
        kernel,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=min(_MOST, room + work + _SPARE)
        ),
        **options,
    )(*operands)


def _bytes(shape: Any, dtype: Any) -> int:
    """Padded to whole registers, 128 lanes by as many sublanes as make 32 bytes."""
    size = np.dtype(dtype).itemsize
    sublanes = 32 // size
    rows, lanes = -(-shape[-2] // sublanes) * sublanes, -(-shape[-1] // 128) * 128
    return math.prod(shape[:-2]) * rows * lanes * size
