"""Dense convolution of windows whose positions have become channels.

With few input channels, most of a register is empty where channels lie along it. Some compilers are also slow
at windows that do not overlap, and at video.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.convolution import convolve


def fold(x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[int]) -> jax.Array:
    """Move windows to the channels along the axes where they do not overlap, then convolve."""
    apart = [k == s and not p for k, s, p in zip(kernel.shape, strides, padding, strict=False)]
    x, kernel = _windows_to_channels(x, kernel, apart)
    strides = [1 if folded else s for folded, s in zip(apart, strides, strict=True)]
    if set(kernel.shape[:-2]) | set(strides) == {1} and not any(padding):
        return x @ kernel.reshape(kernel.shape[-2:])
    return convolve.definition(x, kernel, strides=strides, padding=padding)


def multiply(x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[int]) -> jax.Array:
    """Move windows to the channels along all axes, then multiply matrices."""
    apart = [k == s and not p for k, s, p in zip(kernel.shape, strides, padding, strict=False)]
    x, kernel = _windows_to_channels(x, kernel, apart)
    for axis, (folded, stride, zeros) in enumerate(zip(apart, strides, padding, strict=True)):
        x, kernel = _im2col(x, kernel, axis, 1 if folded else stride, zeros)
    return x @ kernel.reshape(kernel.shape[-2:])


def _windows_to_channels(
    x: jax.Array, kernel: jax.Array, apart: Sequence[bool]
) -> tuple[jax.Array, jax.Array]:
    """Move the positions within windows to the channels, along the axes where windows do not overlap."""
    batch, *grid, _ = x.shape
    *window, inputs, outputs = kernel.shape
    sides = [k if folded else 1 for k, folded in zip(window, apart, strict=True)]
    counts = [n // side for n, side in zip(grid, sides, strict=True)]
    x = x[:, *(slice(n * side) for n, side in zip(counts, sides, strict=True))]
    pairs = [size for pair in zip(counts, sides, strict=True) for size in pair]
    x = x.reshape(batch, *pairs, inputs)
    rank = len(grid)
    x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    within = [axis for axis in range(rank) if apart[axis]]
    across = [axis for axis in range(rank) if not apart[axis]]
    kernel = kernel.transpose(*across, *within, rank, rank + 1)
    left = [1 if folded else k for k, folded in zip(window, apart, strict=True)]
    return x.reshape(batch, *counts, -1), kernel.reshape(*left, -1, outputs)


def _im2col(
    x: jax.Array, kernel: jax.Array, axis: int, stride: int, zeros: int
) -> tuple[jax.Array, jax.Array]:
    """Copy the positions that windows read along an axis to the channels."""
    size, along = kernel.shape[axis], axis + 1
    x = jnp.pad(x, [(zeros, zeros) if i == along else (0, 0) for i in range(x.ndim)])
    last = (x.shape[along] - size) // stride * stride
    read = [lax.slice_in_dim(x, first, first + last + 1, stride, along) for first in range(size)]
    kernel = jnp.moveaxis(kernel, axis, -3)
    kernel = kernel.reshape(*kernel.shape[:-3], -1, kernel.shape[-1])
    return jnp.concatenate(read, axis=-1), jnp.expand_dims(kernel, axis)
