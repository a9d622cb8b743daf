"""Depthwise convolution as a sum of shifted products, one for each tap of the window.

XLA's grouped convolution takes up to 100 times as long on CPUs, and on GPUs it is fast only in two dimensions
with one kernel per channel. CPUs ("shifted") and GPUs ("padded") differ in how zeros are added and in the
gradient of the kernel. Channels stay the contiguous axis; sums are kept in float32 at least.
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

# XLA's CPU compiler still fuses a sum of this many products into one fast loop; longer sums are scanned
# (measured: 5x5 and 3x3x3 windows fuse, 5x5x5 unrolled is ten times slower than scanned).
MAX_FUSED_TERMS = 36
_ROWS_PER_STEP = 4  # rows of the image that one step of the kernel gradient's scan accumulates

Padding = Sequence[tuple[int, int, int]]  # zeros before, after and between the positions of each axis
Pad = Callable[[jax.Array, Padding], jax.Array]
Total = Callable[[jax.Array, jax.Array, Sequence[int], Sequence[int]], jax.Array]


def convolve_by_taps(x: jax.Array, kernel: jax.Array, stride: int, *, pad: Pad, total: Total) -> jax.Array:
    """Return a plane for each of D kernels: `total` of the padded array and the taps of the kernel."""
    window = kernel.shape[:-2]
    padded = pad(x, [(low, high, 0) for low, high in same_padding(window)])
    strides = grid_strides(x.shape[1:-1], stride)
    grid = tuple(-(-n // s) for n, s in zip(x.shape[1:-1], strides, strict=True))
    taps = jnp.swapaxes(kernel, -1, -2)[None]  # with this axis they are transposed once, not in every loop
    planes = [total(padded, taps[0, ..., d, :], grid, strides) for d in range(kernel.shape[-1])]
    return jnp.stack(planes, axis=1).astype(x.dtype)


def input_gradient_by_taps(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, *, pad: Pad, total: Total
) -> jax.Array:
    """Apply the same operation, with the window reversed, to each plane of the dilated cotangent."""
    grid, window = x.shape[1:-1], kernel.shape[:-2]
    strides, ones = grid_strides(grid, stride), (1,) * len(grid)
    edges = padding_of_gradient(x, kernel, cotangent, strides)
    spread = [(low, high, s - 1) for (low, high), s in zip(edges, strides, strict=True)]
    taps = jnp.flip(jnp.moveaxis(kernel, -1, 0), axis=tuple(range(1, 1 + len(window))))
    taps = lax.optimization_barrier(taps)  # transposed once, not in every loop

    def of_plane(d: jax.Array | int) -> jax.Array:
        plane = lax.dynamic_index_in_dim(cotangent, d, axis=1, keepdims=False)
        return total(pad(plane, spread), taps[d], grid, ones)

    if len(taps) == 1 or len(taps) * math.prod(window) <= MAX_FUSED_TERMS:
        out = functools.reduce(jnp.add, map(of_plane, range(len(taps))))
    else:
        start = jnp.zeros(x.shape, accumulator(x))
        out = lax.fori_loop(0, len(taps), lambda d, out: out + of_plane(d), start)
    return out.astype(x.dtype)


def pad_for_cpu(x: jax.Array, padding: Padding) -> jax.Array:
    """Pad [batch, *grid, channels], and add channels that make a long row an odd number of cache lines.

    Otherwise the taps of a window fall on the same few sets of the cache, and 512 channels take three times
    as long.
    """
    line = 64 // x.dtype.itemsize
    lines = -(-x.shape[-1] // line)
    more = (lines | 1) * line - x.shape[-1] if lines >= 16 else 0
    none = (0, 0, 0)
    # with a second axis the compiler does not read the centre's tap from x itself, which would be slower
    return lax.pad(x[:, None], jnp.zeros((), x.dtype), [none, none, *padding, (0, more, 0)])[:, 0]


def pad(x: jax.Array, padding: Padding) -> jax.Array:
    """Pad [batch, *grid, channels]."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])


def pad_for_gpu(x: jax.Array, padding: Padding) -> jax.Array:
    """Pad, and write the result to memory: otherwise every tap checks bounds, at twice the instructions."""
    return lax.optimization_barrier(pad(x, padding))


def pinned(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Fix the layout of arguments and result on GPUs, for a function of arrays and a stride.

    Channels stay last in memory: where the compiler may choose layouts, transpositions are free, and the
    layout that suits one convolution spreads through the network. Nothing is fused with the result: the
    compiler would search for tiles of all taps at once, for minutes.
    """

    def as_written(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def run(x: jax.Array, kernel: jax.Array, *others: Any) -> jax.Array:
        *cotangent, stride = others
        out = function(as_written(x), kernel, *map(as_written, cotangent), stride)
        return as_written(lax.optimization_barrier(out))

    return run


def sum_of_shifts(
    padded: jax.Array, taps: jax.Array, grid: Sequence[int], strides: Sequence[int]
) -> jax.Array:
    """Return out[b, i, c] = sum over w of padded[b, i * stride + w, c] * taps[w, c].

    padded [batch, *padded, channels or more], taps [*window, channels] -> [batch, *grid, channels].
    """
    accumulate, window = accumulator(padded), taps.shape[:-1]
    padded, taps = padded.astype(accumulate), taps.astype(accumulate)
    if math.prod(window) <= MAX_FUSED_TERMS:
        return _fused_sum(padded, taps, grid, strides)
    depth = (grid[0] - 1) * strides[0] + 1

    def add(index: jax.Array, total: jax.Array) -> jax.Array:  # along the window's leading axis
        part = lax.dynamic_slice_in_dim(padded, index, depth, axis=1)
        return total + _fused_sum(part, taps[index][None], grid, strides)

    start = jnp.zeros((len(padded), *grid, taps.shape[-1]), accumulate)
    return lax.fori_loop(0, window[0], add, start)


def _fused_sum(padded: jax.Array, taps: jax.Array, grid: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Return `sum_of_shifts` in one loop."""
    parts = (
        taps[offset] * shift(padded, offset, grid, strides)[..., : taps.shape[-1]]
        for offset in itertools.product(*map(range, taps.shape[:-1]))
    )
    return functools.reduce(jnp.add, parts)


def shifted_kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Sum x * cotangent per tap: rows are scanned, [*window, D, width, channels] accumulates.

    Reducing over rows first keeps width x channels as one long contiguous axis; a plain reduction
    to [channels] per tap runs five times slower.
    """
    window, channels = kernel.shape[:-2], x.shape[-1]
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    batch, planes, *between, width, _ = cotangent.shape
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
            line = lax.dynamic_slice(cotangent, corner, (1, planes, *[1] * (len(lead) - 1), width, channels))
            line = line.reshape(planes, *[1] * (len(window) - 1), width, channels)
            pairs.append((block.astype(accumulate), line.astype(accumulate)))
        return [
            total + sum(block[..., w : w + span : stride, :] * line for block, line in pairs)
            for w, total in enumerate(totals)
        ], None

    zeros = jnp.zeros((planes, *window[:-1], width, channels), accumulate)
    totals, _ = lax.scan(step, [zeros] * window[-1], jnp.asarray(rows).reshape(-1, per_step, len(lead)))
    taps = jnp.stack([total.sum(axis=-2) for total in totals], axis=-2)  # [D, *window, channels]
    return jnp.moveaxis(taps, 0, -1).astype(kernel.dtype)


def _kernel_gradient_by_products(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
) -> jax.Array:
    """Multiply, for every channel, the rows that the window reads by all rows of the cotangent.

    In the product [rows of the window · width, D · width] a tap is the sum of one diagonal. Tensor cores make
    it cheap to compute the other diagonals, which are not used.
    """
    *depth, height, taps, channels, planes = kernel.shape
    *grid, width = cotangent.shape[2:-1]
    strides = grid_strides(cotangent.shape[2:-1], stride)
    x = jnp.pad(x, [(0, 0), *same_padding(kernel.shape[:-2]), (0, 0)])
    given = jnp.moveaxis(jnp.moveaxis(cotangent, -1, 0), 2, -2).reshape(channels, -1, planes * width)
    given, across = lax.optimization_barrier(given), x.shape[-2]
    diagonals = np.arange(across)[:, None] == np.arange(taps)[:, None, None] + stride * np.arange(width)

    def of_frame(x: jax.Array) -> jax.Array:
        """[batch, *grid, channels] under one frame of the window -> [height, taps, channels, D]."""
        offsets = [(0,) * len(depth) + (row, 0) for row in range(height)]
        rows = [shift(x, offset, (*grid, across), (*strides[:-1], 1)) for offset in offsets]
        seen = jnp.moveaxis(jnp.stack(rows, axis=-3), -1, 0).reshape(channels, -1, height * across)
        seen = lax.optimization_barrier(seen)  # else the compiler makes sums of shifted rows again
        contracted = (((1,), (1,)), ((0,), (0,)))
        products = lax.dot_general(
            seen, given, contracted, lax.Precision.HIGHEST, preferred_element_type=accumulator(x)
        ).reshape(channels, height, across, planes, width)
        sums = [(products * diagonal[:, None]).sum((2, 4)) for diagonal in diagonals]
        return jnp.moveaxis(jnp.stack(sums), 2, 0)

    if not depth:
        return of_frame(x).astype(kernel.dtype)
    of_frames = lax.map(
        lambda i: of_frame(lax.dynamic_slice_in_dim(x, i, grid[0], axis=1)), np.arange(*depth)
    )
    return of_frames.astype(kernel.dtype)


shifted = functools.partial(convolve_by_taps, pad=pad_for_cpu, total=sum_of_shifts)
shifted_input_gradient = functools.partial(input_gradient_by_taps, pad=pad_for_cpu, total=sum_of_shifts)
padded = pinned(functools.partial(convolve_by_taps, pad=pad_for_gpu, total=sum_of_shifts))
padded_input_gradient = pinned(
    functools.partial(input_gradient_by_taps, pad=pad_for_gpu, total=sum_of_shifts)
)
padded_kernel_gradient = pinned(_kernel_gradient_by_products)
