"""Depthwise convolution over 2-D and 3-D grids, in a form that is usable on every backend.

XLA's grouped convolution is the definition, but on CPU it is up to 100 times slower than its
arithmetic. There, a window of k taps is a sum of k shifted products instead, and each of the two
gradients has a form of its own. Automatic differentiation is reverse mode only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A sum of this many products is still fused into one fast loop by XLA's CPU compiler; longer ones
# are scanned (measured: 5x5 and 3x3x3 windows fuse, 5x5x5 unrolled is ten times slower than scanned).
_MAX_FUSED_TERMS = 36
_ROWS_PER_STEP = 4  # rows of the image that one step of the kernel gradient's scan accumulates

METHODS = ("auto", "grouped", "shifted")


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, method: str = "auto") -> jax.Array:
    """Convolves each channel with its own windows: cross-correlation, zero padding (k - 1) / 2.

    The same numbers as `lax.conv_general_dilated` with `feature_group_count=channels`.

    Args:
      x: [batch, *grid, channels], grid (height, width) or (time, height, width).
      kernel: [*window, 1, channels * multiplier], odd windows; output channel c * multiplier + d
        belongs to input channel c (the layout of `flax.nnx.Conv` and of lax).
      stride: spatial stride; window centres lie at 0, S, 2S, ... in height and width, and on
        every frame in time.
      method: "grouped" is XLA's grouped convolution, "shifted" the sum of shifted products;
        "auto" takes "shifted" on CPU and "grouped" elsewhere.

    Returns:
      [batch, *grid', channels * multiplier] in x's dtype; grid' is ceil(n / stride) in space.

    Raises:
      ValueError: ranks or channels that do not fit, an even window, a stride below one.
    """
    _check(x, kernel, stride, method)
    return _traced_once(x, kernel.astype(x.dtype), stride, method)


def grid_strides(grid: Sequence[int], stride: int) -> tuple[int, ...]:
    """Per-axis strides: `stride` in height and width, 1 in time."""
    return (1,) * (len(grid) - 2) + (stride, stride)


def same_padding(window: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros on both sides that keep the centre of an odd window on the grid."""
    return [((k - 1) // 2, (k - 1) // 2) for k in window]


def _check(x, kernel, stride, method):
    if method not in METHODS:
        raise ValueError(f"depthwise_conv: method {method!r} is not one of {', '.join(METHODS)}")
    if x.ndim not in (4, 5) or kernel.ndim != x.ndim:
        raise ValueError(
            f"depthwise_conv: x {x.shape} and kernel {kernel.shape} should be [batch, *grid, channels]"
            " and [*window, 1, channels * multiplier] with a grid of two or three axes"
        )
    *window, one, outputs = kernel.shape
    if one != 1 or outputs % x.shape[-1]:
        raise ValueError(
            f"depthwise_conv: kernel {kernel.shape} does not fit {x.shape[-1]} channels;"
            " it should be [*window, 1, channels * multiplier]"
        )
    if any(k % 2 == 0 for k in window):
        raise ValueError(f"depthwise_conv: window {tuple(window)} has an even side; use odd ones")
    if stride < 1:
        raise ValueError(f"depthwise_conv: stride {stride} is below one")


# One rule for differentiation; each of its three parts picks its form by the platform that the
# program is lowered for, so that a program for another platform can be compiled here.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride, method):
    grouped = functools.partial(_grouped, stride=stride)
    shifted = functools.partial(_shifted, stride=stride)
    return _choose(method, grouped, shifted, x, kernel)


def _depthwise_fwd(x, kernel, stride, method):
    return _depthwise(x, kernel, stride, method), (x, kernel)


def _depthwise_bwd(stride, method, residuals, cotangent):
    x, kernel = residuals

    def grouped_x(x, kernel, g):
        return jax.vjp(lambda x: _grouped(x, kernel, stride), x)[1](g)[0]

    def grouped_kernel(x, kernel, g):
        return jax.vjp(lambda kernel: _grouped(x, kernel, stride), kernel)[1](g)[0]

    shifted_x = functools.partial(_shifted_input_gradient, stride=stride)
    shifted_kernel = functools.partial(_shifted_kernel_gradient, stride=stride)
    return (
        _choose(method, grouped_x, shifted_x, x, kernel, cotangent),
        _choose(method, grouped_kernel, shifted_kernel, x, kernel, cotangent),
    )


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)
_traced_once = jax.jit(_depthwise, static_argnums=(2, 3))  # equal blocks share one trace


def _choose(method, grouped, shifted, *args):
    if method == "auto":
        return lax.platform_dependent(*args, cpu=shifted, default=grouped)
    return (grouped if method == "grouped" else shifted)(*args)


def _grouped(x, kernel, stride):
    axes = "THW"[-(x.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        grid_strides(x.shape[1:-1], stride),
        same_padding(kernel.shape[:-2]),
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=x.shape[-1],
    )


# The shifted form. The multiplier's D outputs are D planes, [D, batch, *grid, channels], so that the
# channels stay the contiguous axis. Sums are kept in float32 at least.


def _shifted(x, kernel, stride):
    window = kernel.shape[:-2]
    taps = _to_planes(kernel[..., 0, :], x.shape[-1])  # [D, *window, channels]
    padded = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    strides = grid_strides(x.shape[1:-1], stride)
    grid = tuple(-(-n // s) for n, s in zip(x.shape[1:-1], strides, strict=True))
    out = _sum_of_shifts(padded[None], jnp.moveaxis(taps, 0, -2)[None], grid, strides)
    return _from_planes(out)


def _shifted_input_gradient(x, kernel, cotangent, stride):
    """The same operation, with the window reversed, on the cotangent spread to x's grid."""
    window, channels = kernel.shape[:-2], x.shape[-1]
    taps = _to_planes(kernel[..., 0, :], channels)
    g = _to_planes(cotangent, channels)  # [D, batch, *grid', channels]
    padding = [(0, 0, 0), (0, 0, 0)]
    strides = grid_strides(x.shape[1:-1], stride)
    for n, m, k, s in zip(x.shape[1:-1], g.shape[2:-1], window, strides, strict=True):
        spread = (m - 1) * s + 1
        padding.append(((k - 1) // 2, (k - 1) // 2 + n - spread, s - 1))
    g = lax.pad(g, jnp.zeros((), g.dtype), [*padding, (0, 0, 0)])
    reversed_taps = jnp.flip(taps, axis=tuple(range(1, 1 + len(window))))
    ones = (1,) * len(window)
    return _sum_of_shifts(g, reversed_taps[..., None, :], x.shape[1:-1], ones)[0]


def _sum_of_shifts(planes, taps, grid, strides):
    """out[q, b, i, c] = sum over p and w of planes[p, b, i * stride + w, c] * taps[p, w, q, c].

    planes [P, batch, *padded, channels], taps [P, *window, Q, channels] -> [Q, batch, *grid, channels].
    """
    count, *window = taps.shape[:-2]
    dtype, accumulate = planes.dtype, _accumulator(planes)

    def shifts(plane, taps, window):
        plane, taps, total = plane.astype(accumulate), taps.astype(accumulate), None
        for offset in itertools.product(*map(range, window)):
            end = [o + (n - 1) * s + 1 for o, n, s in zip(offset, grid, strides, strict=True)]
            tap = taps[offset]
            tap = tap.reshape(tap.shape[0], *[1] * (plane.ndim - 1), tap.shape[1])
            part = tap * lax.slice(
                plane, (0, *offset, 0), (plane.shape[0], *end, plane.shape[-1]), (1, *strides, 1)
            )
            total = part if total is None else total + part
        return total

    if count * math.prod(window) <= _MAX_FUSED_TERMS:
        sums = [shifts(plane, tap, window) for plane, tap in zip(planes, taps, strict=True)]
        return functools.reduce(jnp.add, sums).astype(dtype)

    # Too many terms for one loop: scan over planes and over the window's leading axis.
    depth = (grid[0] - 1) * strides[0] + 1

    def step(total, index):
        plane = lax.dynamic_index_in_dim(planes, index // window[0], keepdims=False)
        plane = lax.dynamic_slice_in_dim(plane, index % window[0], depth, axis=1)
        tap = taps.reshape(-1, 1, *taps.shape[2:])[index]
        return total + shifts(plane, tap, [1, *window[1:]]), None

    shape = (taps.shape[-2], planes.shape[1], *grid, planes.shape[-1])
    start = jnp.zeros(shape, accumulate)
    return lax.scan(step, start, jnp.arange(count * window[0]))[0].astype(dtype)


def _shifted_kernel_gradient(x, kernel, cotangent, stride):
    """Sums x * cotangent per tap: rows are scanned, [*window, D, width, channels] accumulates.

    Reducing over rows first keeps width x channels as one long contiguous axis; a plain reduction
    to [channels] per tap runs five times slower.
    """
    window, channels = kernel.shape[:-2], x.shape[-1]
    g = _to_planes(cotangent, channels)  # [D, batch, *grid', channels]
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    lead, width = g.shape[1:-2], g.shape[-2]  # rows: (batch, [time,] height)
    strides = grid_strides(window, stride)
    span = (width - 1) * stride + 1
    rows = np.stack(np.unravel_index(np.arange(math.prod(lead)), lead), axis=-1)
    per_step = max(n for n in range(1, _ROWS_PER_STEP + 1) if len(rows) % n == 0)
    accumulate = _accumulator(x)

    def step(totals, rows):
        pairs = []
        for row in rows:
            corner = (row[0], *(row[1:] * np.array(strides[:-1])), 0, 0)
            block = lax.dynamic_slice(x, corner, (1, *window[:-1], x.shape[-2], channels))
            line = lax.dynamic_slice(g, (0, *row, 0, 0), (g.shape[0], *[1] * len(lead), width, channels))
            line = line.reshape(-1, *[1] * (len(window) - 1), width, channels)
            pairs.append((block.astype(accumulate), line.astype(accumulate)))
        return [
            total + sum(block[..., w : w + span : stride, :] * line for block, line in pairs)
            for w, total in enumerate(totals)
        ], None

    zeros = jnp.zeros((g.shape[0], *window[:-1], width, channels), accumulate)
    totals, _ = lax.scan(step, [zeros] * window[-1], jnp.asarray(rows).reshape(-1, per_step, len(lead)))
    taps = jnp.stack([total.sum(axis=-2) for total in totals], axis=-2)  # [D, *window, channels]
    return _from_planes(taps).reshape(kernel.shape).astype(kernel.dtype)


def _accumulator(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _to_planes(x, channels):
    """[..., channels * D] -> [D, ..., channels]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], channels, -1), -1, 0)


def _from_planes(x):
    """[D, ..., channels] -> [..., channels * D]."""
    x = jnp.moveaxis(x, 0, -1)
    return x.reshape(*x.shape[:-2], -1)
