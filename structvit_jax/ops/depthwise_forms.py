"""Depthwise convolution and its two gradients in several forms: what `depthwise_conv` chooses from.

All take x [batch, *grid, channels], kernel [*window, channels, D] and cotangent [batch, D, *grid', channels].
XLA's grouped convolution is the definition; but on CPUs it is up to 100 times slower than its arithmetic, and
on GPUs fast only in two dimensions with one kernel a channel. The others make a window of k taps a sum of k
shifted products, or matrices for tensor cores, and each of the two gradients has a form of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from structvit_jax.ops import native

# A sum of this many products is still fused into one fast loop by XLA's CPU compiler; longer ones
# are scanned (measured: 5x5 and 3x3x3 windows fuse, 5x5x5 unrolled is ten times slower than scanned).
_MAX_FUSED_TERMS = 36
_ROWS_PER_STEP = 4  # rows of the image that one step of the kernel gradient's scan accumulates


def grid_strides(grid: Sequence[int], stride: int) -> tuple[int, ...]:
    """Per-axis strides: `stride` in height and width, 1 in time."""
    return (1,) * (len(grid) - 2) + (stride, stride)


def same_padding(window: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros on both sides that keep the centre of an odd window on the grid."""
    return [((k - 1) // 2, (k - 1) // 2) for k in window]


# The grouped form: XLA's grouped convolution. XLA's gradients of it take layouts on TPUs that are mostly
# padding (3-D with D = 4: a thousand times the bytes that these move), and minutes to compile.


def _grouped(x, kernel, stride):
    out = _convolve(x, kernel, grid_strides(x.shape[1:-1], stride), same_padding(kernel.shape[:-2]))
    return jnp.moveaxis(out.reshape(*out.shape[:-1], x.shape[-1], -1), -1, 1)


def _grouped_input_gradient(x, kernel, cotangent, stride):
    """A convolution with the window reversed for every plane."""
    strides = grid_strides(x.shape[1:-1], stride)
    ones = (1,) * len(strides)
    padding = _padding_of_gradient(x, kernel, cotangent, strides)
    taps, total = jnp.flip(kernel, axis=tuple(range(len(strides)))), 0.0
    for d in range(kernel.shape[-1]):
        part = _convolve(cotangent[:, d], taps[..., d : d + 1], ones, padding, dilation=strides)
        total += part.astype(_accumulator(x))
    return jnp.asarray(total, x.dtype)


def _grouped_kernel_gradient(x, kernel, cotangent, stride):
    """A sum over positions for every tap."""
    window, accumulate = kernel.shape[:-2], _accumulator(x)
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    cotangent, positions = cotangent.astype(accumulate), tuple(range(x.ndim - 1))
    strides, grid = grid_strides(window, stride), cotangent.shape[2:-1]
    taps = [
        (_shift(x, offset, grid, strides).astype(accumulate) * cotangent[:, d]).sum(positions)
        for offset in itertools.product(*map(range, window))
        for d in range(kernel.shape[-1])
    ]
    stacked = jnp.stack(taps).reshape(*window, kernel.shape[-1], -1)
    return jnp.swapaxes(stacked, -1, -2).astype(kernel.dtype)


def _library_kernel_gradient(x, kernel, cotangent, stride):
    _, pull = jax.vjp(lambda kernel: _grouped(x, kernel, stride), kernel)
    return pull(cotangent)[0]


def _convolve(x, kernel, strides, padding, dilation=None):
    """[batch, *grid, channels], [*window, channels, D] -> [batch, *grid', channels * D]."""
    axes = "THW"[-(x.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        kernel.reshape(*kernel.shape[:-2], 1, -1),
        strides,
        padding,
        lhs_dilation=dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=x.shape[-1],
    )


def _padding_of_gradient(x, kernel, cotangent, strides):
    """Zeros before and after the cotangent, once it is spread to the strides, under a reversed window."""
    sizes = zip(x.shape[1:-1], cotangent.shape[2:-1], kernel.shape[:-2], strides, strict=True)
    return [((k - 1) // 2, (k - 1) // 2 + n - (m - 1) * s - 1) for n, m, k, s in sizes]


def _shift(padded, offset, grid, strides):
    """What the tap at `offset` sees of [batch, *padded, channels]."""
    end = [o + (n - 1) * s + 1 for o, n, s in zip(offset, grid, strides, strict=True)]
    return lax.slice(padded, (0, *offset, 0), (len(padded), *end, padded.shape[-1]), (1, *strides, 1))


# The shifted form. The channels stay the contiguous axis. Sums are kept in float32 at least.


def _shifted(x, kernel, stride, pad, total):
    window = kernel.shape[:-2]
    padded = pad(x, [(low, high, 0) for low, high in same_padding(window)])
    strides = grid_strides(x.shape[1:-1], stride)
    grid = tuple(-(-n // s) for n, s in zip(x.shape[1:-1], strides, strict=True))
    taps = jnp.swapaxes(kernel, -1, -2)[None]  # with this axis they are transposed once, not in every loop
    planes = [total(padded, taps[0, ..., d, :], grid, strides) for d in range(kernel.shape[-1])]
    return jnp.stack(planes, axis=1).astype(x.dtype)


def _shifted_input_gradient(x, kernel, cotangent, stride, pad, total):
    """The same operation, with the window reversed, on every plane of the cotangent spread to x's grid."""
    grid, window = x.shape[1:-1], kernel.shape[:-2]
    strides, ones = grid_strides(grid, stride), (1,) * len(grid)
    edges = _padding_of_gradient(x, kernel, cotangent, strides)
    spread = [(low, high, s - 1) for (low, high), s in zip(edges, strides, strict=True)]
    taps = jnp.flip(jnp.moveaxis(kernel, -1, 0), axis=tuple(range(1, 1 + len(window))))
    taps = lax.optimization_barrier(taps)  # transposed once, not in every loop

    def of_plane(d):
        plane = lax.dynamic_index_in_dim(cotangent, d, axis=1, keepdims=False)
        return total(pad(plane, spread), taps[d], grid, ones)

    if len(taps) == 1 or len(taps) * math.prod(window) <= _MAX_FUSED_TERMS:
        out = functools.reduce(jnp.add, map(of_plane, range(len(taps))))
    else:
        start = jnp.zeros(x.shape, _accumulator(x))
        out = lax.fori_loop(0, len(taps), lambda d, out: out + of_plane(d), start)
    return out.astype(x.dtype)


def _pad_within(x, padding):
    """Zeros before, after and between the places of [batch, *grid, channels], and channels that make a long
    row an odd number of cache lines. Else what the taps of a window see would fall on the same few sets of
    the cache of a CPU, and 512 channels take three times as long."""
    line = 64 // x.dtype.itemsize
    lines = -(-x.shape[-1] // line)
    more = (lines | 1) * line - x.shape[-1] if lines >= 16 else 0
    none = (0, 0, 0)
    # with a second axis the compiler does not read the centre's tap from x itself, which would be slower
    return lax.pad(x[:, None], jnp.zeros((), x.dtype), [none, none, *padding, (0, more, 0)])[:, 0]


def _pad(x, padding):
    """Zeros before, after and between the places of [batch, *grid, channels]."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])


def _pad_before(x, padding):
    """Zeros likewise, for GPUs: in memory, as bounds that every tap checks cost twice its instructions."""
    return lax.optimization_barrier(_pad(x, padding))


def _sum_of_shifts(padded, taps, grid, strides):
    """out[b, i, c] = sum over w of padded[b, i * stride + w, c] * taps[w, c].

    padded [batch, *padded, channels or more], taps [*window, channels] -> [batch, *grid, channels].
    """
    accumulate, window = _accumulator(padded), taps.shape[:-1]
    padded, taps = padded.astype(accumulate), taps.astype(accumulate)
    if math.prod(window) <= _MAX_FUSED_TERMS:
        return _fused_sum(padded, taps, grid, strides)
    depth = (grid[0] - 1) * strides[0] + 1

    def add(index, total):  # of the window's leading axis
        part = lax.dynamic_slice_in_dim(padded, index, depth, axis=1)
        return total + _fused_sum(part, taps[index][None], grid, strides)

    start = jnp.zeros((len(padded), *grid, taps.shape[-1]), accumulate)
    return lax.fori_loop(0, window[0], add, start)


def _fused_sum(padded, taps, grid, strides):
    """What `_sum_of_shifts` gives, in one loop."""
    total = None
    for offset in itertools.product(*map(range, taps.shape[:-1])):
        part = taps[offset] * _shift(padded, offset, grid, strides)[..., : taps.shape[-1]]
        total = part if total is None else total + part
    return total


def _shifted_kernel_gradient(x, kernel, cotangent, stride):
    """Sums x * cotangent per tap: rows are scanned, [*window, D, width, channels] accumulates.

    Reducing over rows first keeps width x channels as one long contiguous axis; a plain reduction
    to [channels] per tap runs five times slower.
    """
    window, channels = kernel.shape[:-2], x.shape[-1]
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    batch, planes, *lead, width, _ = cotangent.shape
    lead = (batch, *lead)  # rows: (batch, [time,] height)
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


def _rows_kernel_gradient(x, kernel, cotangent, stride):
    """Matrix products for every channel: of all that the window's rows see with all rows of the cotangent,
    place by place, [rows of the window · width, D · width]. A tap is the sum of one diagonal. On tensor cores
    it costs little that the other diagonals go unused.
    """
    *depth, height, taps, channels, planes = kernel.shape
    *grid, width = cotangent.shape[2:-1]
    strides = grid_strides(cotangent.shape[2:-1], stride)
    x = jnp.pad(x, [(0, 0), *same_padding(kernel.shape[:-2]), (0, 0)])
    given = jnp.moveaxis(jnp.moveaxis(cotangent, -1, 0), 2, -2).reshape(channels, -1, planes * width)
    given, across = lax.optimization_barrier(given), x.shape[-2]
    diagonals = np.arange(across)[:, None] == np.arange(taps)[:, None, None] + stride * np.arange(width)

    def of_frame(x):  # [batch, *grid, channels] under one frame of the window -> [height, taps, channels, D]
        offsets = [(0,) * len(depth) + (row, 0) for row in range(height)]
        rows = [_shift(x, offset, (*grid, across), (*strides[:-1], 1)) for offset in offsets]
        seen = jnp.moveaxis(jnp.stack(rows, axis=-3), -1, 0).reshape(channels, -1, height * across)
        seen = lax.optimization_barrier(seen)  # else the compiler makes sums of shifted rows again
        contracted = (((1,), (1,)), ((0,), (0,)))
        products = lax.dot_general(
            seen, given, contracted, lax.Precision.HIGHEST, preferred_element_type=_accumulator(x)
        ).reshape(channels, height, across, planes, width)
        sums = [(products * diagonal[:, None]).sum((2, 4)) for diagonal in diagonals]
        return jnp.moveaxis(jnp.stack(sums), 2, 0)

    if not depth:
        return of_frame(x).astype(kernel.dtype)
    of_frames = lax.map(
        lambda i: of_frame(lax.dynamic_slice_in_dim(x, i, grid[0], axis=1)), np.arange(*depth)
    )
    return of_frames.astype(kernel.dtype)


# The banded form, for tensor cores. Along a row a window is a banded matrix, from places seen to those
# that are given. Rows are cut into stretches, so that little of the matrix is zeros, and become features of a
# dense grouped convolution over the other axes, with a group for every channel and stretch.

# cuDNN is fast at groups of 16 or 32 features; at 56 it took eight times as long.
_STRETCH = 32  # places that a stretch of a row sees


@dataclasses.dataclass(frozen=True)
class _Stretches:
    count: int
    seen: int  # places that each sees of a padded row; a power of two
    given: int  # places that each gives
    step: int  # from one to the next, in places seen
    band: np.ndarray  # bool [seen, as many, taps]: which tap leads from a place seen to a place given

    @classmethod
    def of(cls, across: int, taps: int, width: int, stride: int) -> _Stretches:
        """Of rows padded to `across`, under a window of so many taps that gives `width` places."""
        seen = 1 << (max(min(across, _STRETCH), taps, 8) - 1).bit_length()
        given = (seen - taps) // stride + 1
        places = np.arange(seen)
        band = places[:, None, None] == stride * places[:, None] + np.arange(taps)
        band &= (places < given)[:, None]
        return cls(-(-width // given), seen, given, given * stride, band)

    def features(self, padded):
        """[batch, *grid, across, channels] -> [batch, *grid, count · channels · seen]."""
        needed = (self.count - 1) * self.step + self.seen
        none = [(0, 0, 0)] * (padded.ndim - 3)
        rows = _pad(padded, [*none, (0, needed - padded.shape[-2], 0)])
        cuts = [rows[..., i * self.step : i * self.step + self.seen, :] for i in range(self.count)]
        stacked = jnp.swapaxes(jnp.stack(cuts, axis=-3), -1, -2)
        return stacked.reshape(*stacked.shape[:-3], -1)


def _sum_of_bands(padded, taps, grid, strides):
    """What `_sum_of_shifts` gives, rounded to the dtype of `padded`."""
    cut, channels = _Stretches.of(padded.shape[-2], taps.shape[-2], grid[-1], strides[-1]), taps.shape[-1]
    band = jnp.asarray(cut.band, taps.dtype)
    matrices = jnp.einsum("...kc,ijk->...icj", taps, band, precision=lax.Precision.HIGHEST)
    matrices = jnp.repeat(matrices[..., None, :, :], cut.count, axis=-3)
    matrices = matrices.reshape(*matrices.shape[:-3], -1)
    out = _convolve_rows(cut.features(padded), matrices, strides[:-1], cut.count * channels)
    out = out.reshape(*out.shape[:-1], cut.count, channels, cut.seen)[..., : cut.given]
    return jnp.swapaxes(out, -1, -2).reshape(*out.shape[:-3], -1, channels)[..., : grid[-1], :]


def _banded_kernel_gradient(x, kernel, cotangent, stride):
    """The gradient of the matrices, and of their bands."""
    *window, taps, channels, planes = kernel.shape
    padded = jnp.pad(x, [(0, 0), *same_padding(kernel.shape[:-2]), (0, 0)])
    strides = grid_strides(kernel.shape[:-2], stride)
    width = cotangent.shape[-2]
    cut = _Stretches.of(padded.shape[-2], taps, width, stride)
    rows, groups = cut.features(padded), cut.count * channels
    whole = [(0, 0)] * (cotangent.ndim - 2) + [(0, cut.count * cut.given - width), (0, 0)]
    given = jnp.pad(cotangent, whole)
    given = jnp.swapaxes(given.reshape(*given.shape[:-2], cut.count, cut.given, channels), -1, -2)
    given = jnp.pad(given, [(0, 0)] * (given.ndim - 1) + [(0, cut.seen - cut.given)])
    given = given.reshape(*given.shape[:-3], -1)
    matrices = jnp.zeros((*window, cut.seen, groups * cut.seen), x.dtype)
    _, pull = jax.vjp(lambda matrices: _convolve_rows(rows, matrices, strides[:-1], groups), matrices)

    def of_plane(d):
        (found,) = pull(given[:, d])
        found = found.reshape(*window, cut.seen, cut.count, channels, cut.seen).astype(_accumulator(x))
        band = jnp.asarray(cut.band, found.dtype)
        return jnp.einsum("...iscj,ijk->...kc", found, band, precision=lax.Precision.HIGHEST)

    return jnp.stack([of_plane(d) for d in range(planes)], axis=-1).astype(kernel.dtype)


def _convolve_rows(rows, matrices, strides, groups):
    """[batch, *grid, groups · seen], [*window, seen, groups · given] -> [batch, *grid', groups · given]."""
    axes = "TH"[-len(strides) :]
    return lax.conv_general_dilated(
        rows,
        matrices,
        strides,
        "VALID",
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )


def _accumulator(x):
    return jnp.promote_types(x.dtype, jnp.float32)


class Form(NamedTuple):
    forward: Callable  # (x, kernel, stride=); the native one adds a bias that it is given
    of_input: Callable  # gradient (x, kernel, cotangent, stride=)
    of_kernel: Callable


FORMS = {
    "grouped": Form(_grouped, _grouped_input_gradient, _grouped_kernel_gradient),
    "library": Form(_grouped, _grouped_input_gradient, _library_kernel_gradient),
    "shifted": Form(
        functools.partial(_shifted, pad=_pad_within, total=_sum_of_shifts),
        functools.partial(_shifted_input_gradient, pad=_pad_within, total=_sum_of_shifts),
        _shifted_kernel_gradient,
    ),
    "padded": Form(
        functools.partial(_shifted, pad=_pad_before, total=_sum_of_shifts),
        functools.partial(_shifted_input_gradient, pad=_pad_before, total=_sum_of_shifts),
        _rows_kernel_gradient,
    ),
    "banded": Form(
        functools.partial(_shifted, pad=_pad, total=_sum_of_bands),
        functools.partial(_shifted_input_gradient, pad=_pad, total=_sum_of_bands),
        _banded_kernel_gradient,
    ),
    "native": Form(native.depthwise, native.depthwise_input_gradient, native.depthwise_kernel_gradient),
}
FORMS["pallas"] = FORMS["grouped"]  # forward
