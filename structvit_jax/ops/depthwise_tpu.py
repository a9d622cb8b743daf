"""Both gradients of a depthwise convolution as one kernel for TPUs, in Pallas, which reads its arrays once.

Frame after frame passes through vector memory, where as many stay, padded with zeros, as the window has in
time. An image is one frame.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from structvit_jax.ops.tpu_kernels import call_kernel

_MARGIN = 8  # zeros beside a row: rows then start on a register, and windows reach no farther
_MOST = 48 * 2**20  # bytes of vector memory that frames may take
_WORK = 4 * 2**20  # bytes of what is made of a row


def fits(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the frames that one step needs find room."""
    *window, channels, patterns = kernel.shape
    time, height, width = _frames(window, x.shape[1:-1])
    lanes = -(-channels // 128) * 128
    return max(window) // 2 <= _MARGIN and 4 * time * height * width * lanes * (1 + patterns) <= _MOST


def gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of x and kernel, for stride 1.

    Args:
      x: [batch, *grid, channels].
      kernel: [*window, channels, D].
      cotangent: [batch, D, *grid, channels].

    Returns:
      Gradients like x, and in float32 like the kernel.
    """
    if x.ndim == 4:  # a clip of one frame
        d_x, d_kernel = gradients(x[:, None], kernel[None], cotangent[:, :, None], interpret=interpret)
        return d_x[:, 0], d_kernel[0]
    batch, frames, height, width, channels = x.shape
    *window, _, patterns = kernel.shape
    taps = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32).reshape(-1, channels)
    reach, ring = window[0] // 2, _frames(window, x.shape[1:-1])

    def entering(t):
        return jnp.minimum(t, frames - 1)

    frame = (1, 1, height, width, channels)
    d_x, sums = call_kernel(
        functools.partial(_kernel, window=window, frames=frames),
        (x, cotangent, taps),
        grid=(batch, frames + reach),
        in_specs=[
            pl.BlockSpec(frame, lambda b, t: (b, entering(t), 0, 0, 0)),
            pl.BlockSpec((1, patterns, *frame[1:]), lambda b, t: (b, 0, entering(t), 0, 0, 0)),
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
            pltpu.VMEM((patterns, *ring, channels), jnp.float32),
        ],
        semantics=["arbitrary", "arbitrary"],
        work=_WORK,
        cost_estimate=pl.CostEstimate(
            flops=4 * cotangent.size * math.prod(window),
            transcendentals=0,
            bytes_accessed=_bytes(x, cotangent, x),
        ),
        interpret=interpret,
        name="depthwise_gradients",
    )
    return d_x, jnp.swapaxes(sums.sum(axis=1).reshape(*window, patterns, channels), -1, -2)


def _bytes(*arrays):
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _frames(window, grid):
    """Padded frames that stay: as many as the window has in time, rows, and places of a row."""
    width = _MARGIN + grid[-1] + window[-1] // 2
    time = window[0] if len(window) == 3 else 1
    return time, grid[-2] + window[-2] - 1, -(-width // 8) * 8


def _kernel(x_ref, dy_ref, taps_ref, dx_ref, sums_ref, x_ring, dy_ring, *, window, frames):
    """At step t frame t enters, and the frame in the middle of those in memory is computed."""
    (time, *_), patterns = window, dy_ref.shape[1]
    _, _, height, width, channels = x_ref.shape
    above, reach = window[1] // 2, time // 2
    b, t = pl.program_id(0), pl.program_id(1)

    @pl.when((b == 0) & (t == 0))
    def start():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(t == 0)
    def clear():
        x_ring[...] = jnp.zeros_like(x_ring)
        dy_ring[...] = jnp.zeros_like(dy_ring)

    entering = lax.rem(t, time)
    inside = (t < frames).astype(jnp.float32)  # zeros follow the last frame

    def enter(row, _):
        place = (entering, above + row, pl.ds(_MARGIN, width))
        x_ring[place] = x_ref[0, 0, row].astype(jnp.float32) * inside
        for d in range(patterns):
            dy_ring[d, *place] = dy_ref[0, d, 0, row].astype(jnp.float32) * inside
        return 0

    lax.fori_loop(0, height, enter, 0)

    def compute(row, _):
        middle = lax.rem(t - reach, time)
        centre = (middle, above + row, pl.ds(_MARGIN, width))
        dy = [dy_ring[d, *centre] for d in range(patterns)]
        total = jnp.zeros((width, channels), jnp.float32)
        for tap, (a, i, j) in enumerate(itertools.product(*map(range, window))):
            shift = j - window[2] // 2
            before, after = lax.rem(t - 2 * reach + a + time, time), lax.rem(t - a + time, time)
            x = x_ring[before, row + i, pl.ds(_MARGIN + shift, width)]
            for d in range(patterns):
                n = tap * patterns + d
                sums_ref[n] += x * dy[d]
                reflected = dy_ring[d, after, row + 2 * above - i, pl.ds(_MARGIN - shift, width)]
                total += reflected * taps_ref[pl.ds(n, 1)]
        dx_ref[0, 0, row] = total.astype(dx_ref.dtype)
        return 0

    @pl.when(t >= reach)
    def rows():
        lax.fori_loop(0, height, compute, 0)
