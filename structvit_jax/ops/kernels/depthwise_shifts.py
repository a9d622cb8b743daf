"""Depthwise convolution as a sum of shifted products, one for each tap of the window.

XLA's grouped convolution takes up to 100 times as long on CPUs. On GPUs it is fast only in two dimensions
with one kernel per channel. The variants for CPUs ("shifted") and GPUs ("padded") differ in how they pad, and
in the gradient of the kernel. Channels stay the contiguous axis; sums are accumulated in at least float32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from structvit_jax.ops.convolution import grid_strides, same_padding
from structvit_jax.ops.kernels.depthwise_xla import accumulator, padding_of_gradient, shift

# XLA's CPU compiler fuses a sum of up to this many products into one fast loop. Longer sums use a loop over
# the leading axis of the window. Measured: 5x5 and 3x3x3 windows fuse; 5x5x5 in one sum is ten times slower.
MAX_FUSED_TERMS = 36
_ROWS_PER_STEP = 4  # image rows that one scan step of the kernel gradient accumulates

Padding = Sequence[tuple[int, int, int]]  # zeros before, after and between the positions of each axis
Pad = Callable[[jax.Array, Padding], jax.Array]
SumOverTaps = Callable[[jax.Array, jax.Array, Sequence[int], Sequence[int]], jax.Array]  # see sum_of_shifts


def convolve_by_taps(
    x: jax.Array, kernel: jax.Array, stride: int, *, pad: Pad, sum_over_taps: SumOverTaps
) -> jax.Array:
    """Convolve x with each of D kernels, given a function that sums over the taps of one."""
    window = kernel.shape[:-2]
    padded = pad(x, [(low, high, 0) for low, high in same_padding(window)])
    strides = grid_strides(x.shape[1:-1], stride)
    grid = tuple(-(-n // s) for n, s in zip(x.shape[1:-1], strides, strict=True))
    taps = jnp.swapaxes(kernel, -1, -2)[None]  # the extra axis makes XLA transpose once, not in every loop
    outputs = [sum_over_taps(padded, taps[0, ..., d, :], grid, strides) for d in range(kernel.shape[-1])]
    return jnp.stack(outputs, axis=1).astype(x.dtype)


def input_gradient_by_taps(
    x: jax.Array,
    kernel: jax.Array,
    cotangent: jax.Array,
    stride: int,
    *,
    pad: Pad,
    sum_over_taps: SumOverTaps,
) -> jax.Array:
    """Convolve the dilated cotangent of each kernel with the reversed window, and add up the results."""
    grid, window = x.shape[1:-1], kernel.shape[:-2]
    strides, ones = grid_strides(grid, stride), (1,) * len(grid)
    edges = padding_of_gradient(x, kernel, cotangent, strides)
    spread = [(low, high, s - 1) for (low, high), s in zip(edges, strides, strict=True)]
    taps = jnp.flip(jnp.moveaxis(kernel, -1, 0), axis=tuple(range(1, 1 + len(window))))
    taps = lax.optimization_barrier(taps)  # makes XLA transpose once, not in every loop

    def of_kernel(d: jax.Array | int) -> jax.Array:
        one = lax.dynamic_index_in_dim(cotangent, d, axis=1, keepdims=False)
        return sum_over_taps(pad(one, spread), taps[d], grid, ones)

    if len(taps) == 1 or len(taps) * math.prod(window) <= MAX_FUSED_TERMS:
        out = functools.reduce(jnp.add, map(of_kernel, range(len(taps))))
    else:
        start = jnp.zeros(x.shape, accumulator(x))
        out = lax.fori_loop(0, len(taps), lambda d, out: out + of_kernel(d), start)
    return out.astype(x.dtype)


def pad_for_cpu(x: jax.Array, padding: Padding) -> jax.Array:
    """Pad [batch, *grid, channels], also with channels, until a position is an odd number of cache lines.

    Otherwise the taps of a window compete for the same few cache sets, and 512 channels take three times as
    long. Channels are added only from 16 cache lines on.
    """
    line = 64 // x.dtype.itemsize
    lines = -(-x.shape[-1] // line)
    more = (lines | 1) * line - x.shape[-1] if lines >= 16 else 0
    none = (0, 0, 0)
    # The second axis prevents the compiler from reading the centre tap from x itself, which would be slower.
    return lax.pad(x[:, None], jnp.zeros((), x.dtype), [none, none, *padding, (0, more, 0)])[:, 0]


def pad(x: jax.Array, padding: Padding) -> jax.Array:
    """Pad [batch, *grid, channels]."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])


def pad_for_gpu(x: jax.Array, padding: Padding) -> jax.Array:
    """Pad, and store the result. Fused padding makes every tap check bounds, with twice the instructions."""
    return lax.optimization_barrier(pad(x, padding))


def pinned(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Fix the memory layout of the arguments and the result of a kernel on GPUs: channels stay last.

    If the compiler may choose layouts, it treats transpositions as free, and the layout that suits one
    convolution spreads through the network. The result is not fused with later operations, because the
    compiler would then search for minutes for tile sizes for all taps at once.

    Args:
      function: (x, kernel, stride) or (x, kernel, cotangent, stride) -> array.
    """

    def row_major(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def run(x: jax.Array, kernel: jax.Array, *others: Any) -> jax.Array:
        *cotangent, stride = others
        out = function(row_major(x), kernel, *map(row_major, cotangent), stride)
        return row_major(lax.optimization_barrier(out))

    return run


def sum_of_shifts(
    padded: jax.Array, taps: jax.Array, grid: Sequence[int], strides: Sequence[int]
) -> jax.Array:
    """Return out[b, i, c], the sum over w of padded[b, i * stride + w, c] * taps[w, c].

    padded [batch, *padded, channels or more], taps [*window, channels] -> [batch, *grid, channels].
    """
    accumulate, window = accumulator(padded), taps.shape[:-1]
    padded, taps = padded.astype(accumulate), taps.astype(accumulate)
    if math.prod(window) <= MAX_FUSED_TERMS:
        return _fused_sum(padded, taps, grid, strides)
    depth = (grid[0] - 1) * strides[0] + 1

    def add(index: jax.Array, total: jax.Array) -> jax.Array:  # one index of the window's leading axis
        part = lax.dynamic_slice_in_dim(padded, index, depth, axis=1)
        return total + _fused_sum(part, taps[index][None], grid, strides)

    start = jnp.zeros((len(padded), *grid, taps.shape[-1]), accumulate)
    return lax.fori_loop(0, window[0], add, start)


def _fused_sum(padded: jax.Array, taps: jax.Array, grid: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Compute `sum_of_shifts` as one expression, which XLA fuses into one loop."""
    parts = (
        taps[offset] * shift(padded, offset, grid, strides)[..., : taps.shape[-1]]
        for offset in itertools.product(*map(range, taps.shape[:-1]))
    )
    return functools.reduce(jnp.add, parts)


def shifted_kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Sum x * cotangent per tap: scan over rows, and accumulate [*window, D, width, channels].

    The sum over the width comes last, so that width and channels are one long contiguous axis during the
    scan. A plain reduction to [channels] per tap is five times slower.
    """
    window, channels = kernel.shape[:-2], x.shape[-1]
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    batch, multiplier, *between, width, _ = cotangent.shape
    lead = (batch, *between)  # rows: (batch, [time,] height)
    strides = grid_strides(window, stride)
    span = (width - 1) * stride + 1
    rows = np.stack(np.unravel_index(np.arange(math.prod(lead)), lead), axis=-1)
    per_step = max(n for n in range(1, _ROWS_PER_STEP + 1) if len(rows) % n == 0)
    accumulate = accumulator(x)

    def step(totals: list[jax.Array], rows: jax.Array) -> tuple[list[jax.Array], None]:
        pairs = []
        for row in rows:
            corner = (row[0], *(row[1:] * np.array(strides[:-1])), 0, 0)
            block = lax.dynamic_slice(x, corner, (1, *window[:-1], x.shape[-2], channels))
            corner = (row[0], 0, *row[1:], 0, 0)
            line = lax.dynamic_slice(
                cotangent, corner, (1, multiplier, *[1] * (len(lead) - 1), width, channels)
            )
            line = line.reshape(multiplier, *[1] * (len(window) - 1), width, channels)
            pairs.append((block.astype(accumulate), line.astype(accumulate)))
        return [
            total + sum(block[..., w : w + span : stride, :] * line for block, line in pairs)
            for w, total in enumerate(totals)
        ], None

    zeros = jnp.zeros((multiplier, *window[:-1], width, channels), accumulate)
    totals, _ = lax.scan(step, [zeros] * window[-1], jnp.asarray(rows).reshape(-1, per_step, len(lead)))
    taps = jnp.stack([total.sum(axis=-2) for total in totals], axis=-2)  # [D, *window, channels]
    return jnp.moveaxis(taps, 0, -1).astype(kernel.dtype)


def _kernel_gradient_by_products(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
) -> jax.Array:
    """Compute the gradient of the kernel by one matrix product per channel, for tensor cores.

    The product of the rows that the window reads with the rows of the cotangent is
    [rows of the window · width, D · width]. The gradient of a tap is the sum of one of its diagonals. The
    other diagonals are not used, but cost little on tensor cores.
    """
    *depth, height, taps, channels, multiplier = kernel.shape
    *grid, width = cotangent.shape[2:-1]
    strides = grid_strides(cotangent.shape[2:-1], stride)
    x = jnp.pad(x, [(0, 0), *same_padding(kernel.shape[:-2]), (0, 0)])
    cotangents = jnp.moveaxis(jnp.moveaxis(cotangent, -1, 0), 2, -2).reshape(channels, -1, multiplier * width)
    cotangents, padded_width = lax.optimization_barrier(cotangents), x.shape[-2]
    diagonals = np.arange(padded_width)[:, None] == np.arange(taps)[:, None, None] + stride * np.arange(width)

    def of_frame(x: jax.Array) -> jax.Array:
        """Return the gradient of one frame of the window, [height, taps, channels, D]."""
        offsets = [(0,) * len(depth) + (row, 0) for row in range(height)]
        rows = [shift(x, offset, (*grid, padded_width), (*strides[:-1], 1)) for offset in offsets]
        inputs = jnp.moveaxis(jnp.stack(rows, axis=-3), -1, 0).reshape(channels, -1, height * padded_width)
        # Without the barrier, the compiler computes sums of shifted rows instead.
        inputs = lax.optimization_barrier(inputs)
        contracted = (((1,), (1,)), ((0,), (0,)))
        products = lax.dot_general(
            inputs, cotangents, contracted, lax.Precision.HIGHEST, preferred_element_type=accumulator(x)
        ).reshape(channels, height, padded_width, multiplier, width)
        sums = [(products * diagonal[:, None]).sum((2, 4)) for diagonal in diagonals]
        return jnp.moveaxis(jnp.stack(sums), 2, 0)

    if not depth:
        return of_frame(x).astype(kernel.dtype)
    of_frames = lax.map(
        lambda i: of_frame(lax.dynamic_slice_in_dim(x, i, grid[0], axis=1)), np.arange(*depth)
    )
    return of_frames.astype(kernel.dtype)


shifted = functools.partial(convolve_by_taps, pad=pad_for_cpu, sum_over_taps=sum_of_shifts)
shifted_input_gradient = functools.partial(
    input_gradient_by_taps, pad=pad_for_cpu, sum_over_taps=sum_of_shifts
)
padded = pinned(functools.partial(convolve_by_taps, pad=pad_for_gpu, sum_over_taps=sum_of_shifts))
padded_input_gradient = pinned(
    functools.partial(input_gradient_by_taps, pad=pad_for_gpu, sum_over_taps=sum_of_shifts)
)
padded_kernel_gradient = pinned(_kernel_gradient_by_products)
