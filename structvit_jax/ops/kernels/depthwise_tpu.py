"""Depthwise convolution for TPUs, with one Pallas kernel for both gradients that reads its arrays once.

The forward pass is XLA's. The Pallas kernel streams frames through a ring buffer in vector memory. The buffer
holds as many frames, padded with zeros, as the window has along time. An image is one frame.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from structvit_jax.ops.kernels.depthwise_xla import Depthwise, grouped, with_gradients
from structvit_jax.ops.kernels.pallas import Ref, call_kernel, interpreted_elsewhere

_MARGIN = 8  # zeros before a row, so that it starts on a register; half a window may not be larger
_LIMIT = 48 * 2**20  # largest number of bytes of the ring buffers
_WORK = 4 * 2**20  # bytes of the intermediate results of a row


def supports(x: jax.Array, kernel: jax.Array, *_: jax.Array | None, stride: int) -> bool:
    """Return whether stride is 1, the dtype is not float64, and the ring buffers fit into vector memory."""
    if stride > 1 or x.dtype == jnp.float64:
        return False
    *window, channels, multiplier = kernel.shape
    time, height, width = _ring_shape(window, x.shape[1:-1])
    lanes = -(-channels // 128) * 128
    return max(window) // 2 <= _MARGIN and 4 * time * height * width * lanes * (1 + multiplier) <= _LIMIT


def gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and kernel, for stride 1.

    Args:
      x: [batch, *grid, channels].
      kernel: [*window, channels, D].
      cotangent: [batch, D, *grid, channels].

    Returns:
      The gradient of x in the dtype of x, and the gradient of the kernel in float32.
    """
    if x.ndim == 4:  # a clip of one frame
        d_x, d_kernel = gradients(x[:, None], kernel[None], cotangent[:, :, None], interpret=interpret)
        return d_x[:, 0], d_kernel[0]
    batch, frames, height, width, channels = x.shape
    *window, _, multiplier = kernel.shape
    taps = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32).reshape(-1, channels)
    reach, ring = window[0] // 2, _ring_shape(window, x.shape[1:-1])

    def entering(t: jax.Array) -> jax.Array:
        return jnp.minimum(t, frames - 1)

    frame = (1, 1, height, width, channels)
    d_x, sums = call_kernel(
        functools.partial(_kernel, window=window, frames=frames),
        (x, cotangent, taps),
        grid=(batch, frames + reach),
        in_specs=[
            pl.BlockSpec(frame, lambda b, t: (b, entering(t), 0, 0, 0)),
            pl.BlockSpec((1, multiplier, *frame[1:]), lambda b, t: (b, 0, entering(t), 0, 0, 0)),
            pl.BlockSpec(taps.shape, lambda b, t: (0, 0)),
        ],
        out_specs=[
            pl.BlockSpec(frame, lambda b, t: (b, jnp.maximum(t - reach, 0), 0, 0, 0)),
            pl.BlockSpec((len(taps), width, channels), lambda b, t: (0, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((len(taps), width, channels), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((*ring, channels), jnp.float32),
            pltpu.VMEM((multiplier, *ring, channels), jnp.float32),
        ],
        semantics=["arbitrary", "arbitrary"],
        work=_WORK,
        cost_estimate=pl.CostEstimate(
            flops=4 * cotangent.size * math.prod(window),
            transcendentals=0,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in (x, cotangent, x)),
        ),
        interpret=interpret,
        name="depthwise_gradients",
    )
    return d_x, jnp.swapaxes(sums.sum(axis=1).reshape(*window, multiplier, channels), -1, -2)


def _make(interpret: bool) -> Depthwise:
    def both(
        x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
    ) -> tuple[jax.Array, jax.Array]:
        d_x, d_kernel = gradients(x, kernel, cotangent, interpret=interpret)
        return d_x, d_kernel.astype(kernel.dtype)

    return with_gradients(grouped, both)


depthwise = interpreted_elsewhere(_make)


def _ring_shape(window: Sequence[int], grid: Sequence[int]) -> tuple[int, int, int]:
    """Return the shape of a ring buffer: frames of the window, rows, positions of a row, with padding."""
    width = _MARGIN + grid[-1] + window[-1] // 2
    time = window[0] if len(window) == 3 else 1
    return time, grid[-2] + window[-2] - 1, -(-width // 8) * 8


def _kernel(
    x_ref: Ref, dy_ref: Ref, taps_ref: Ref, dx_ref: Ref, sums_ref: Ref, x_ring: Ref, dy_ring: Ref, *,
    window: Sequence[int], frames: int,
) -> None:  # fmt: skip
    """At step t, load frame t, and compute the gradients at the frame in the middle of the ring buffer."""
    (time, *_), multiplier = window, dy_ref.shape[1]
    _, _, height, width, channels = x_ref.shape
    above, reach = window[1] // 2, time // 2
    b, t = pl.program_id(0), pl.program_id(1)

    @pl.when((b == 0) & (t == 0))
    def start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(t == 0)
    def clear() -> None:
        x_ring[...] = jnp.zeros_like(x_ring)
        dy_ring[...] = jnp.zeros_like(dy_ring)

    entering = lax.rem(t, time)
    inside = (t < frames).astype(jnp.float32)  # zeros follow the last frame

    def enter(row: jax.Array, _: int) -> int:
        position = (entering, above + row, pl.ds(_MARGIN, width))
        x_ring[position] = x_ref[0, 0, row].astype(jnp.float32) * inside
        for d in range(multiplier):
            dy_ring[d, *position] = dy_ref[0, d, 0, row].astype(jnp.float32) * inside
        return 0

    lax.fori_loop(0, height, enter, 0)

    def compute(row: jax.Array, _: int) -> int:
        middle = lax.rem(t - reach, time)
        centre = (middle, above + row, pl.ds(_MARGIN, width))
        dy = [dy_ring[d, *centre] for d in range(multiplier)]
        total = jnp.zeros((width, channels), jnp.float32)
        for tap, (a, i, j) in enumerate(itertools.product(*map(range, window))):
            shift = j - window[2] // 2
            before, after = lax.rem(t - 2 * reach + a + time, time), lax.rem(t - a + time, time)
            x = x_ring[before, row + i, pl.ds(_MARGIN + shift, width)]
            for d in range(multiplier):
                n = tap * multiplier + d
                sums_ref[n] += x * dy[d]
                reflected = dy_ring[d, after, row + 2 * above - i, pl.ds(_MARGIN - shift, width)]
                total += reflected * taps_ref[pl.ds(n, 1)]
        dx_ref[0, 0, row] = total.astype(dx_ref.dtype)
        return 0

    @pl.when(t >= reach)
    def rows() -> None:
        lax.fori_loop(0, height, compute, 0)
