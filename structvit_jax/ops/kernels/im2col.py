"""Dense convolution after moving the positions within windows to the channel axis (im2col).

Where channels lie along registers, few input channels leave most of a register empty. Some compilers are also
slow for windows that do not overlap, and for video.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.convolution import convolve


def fold(x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[int]) -> jax.Array:
    """Move windows to the channel axis along grid axes where they do not overlap, then convolve."""
    disjoint = [k == s and not p for k, s, p in zip(kernel.shape, strides, padding, strict=False)]
    x, kernel = _windows_to_channels(x, kernel, disjoint)
    strides = [1 if folded else s for folded, s in zip(disjoint, strides, strict=True)]
    if set(kernel.shape[:-2]) | set(strides) == {1} and not any(padding):
        return x @ kernel.reshape(kernel.shape[-2:])
    return convolve.definition(x, kernel, strides=strides, padding=padding)


def multiply(x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[int]) -> jax.Array:
    """Move windows to the channel axis along all grid axes, then multiply matrices."""
    disjoint = [k == s and not p for k, s, p in zip(kernel.shape, strides, padding, strict=False)]
    x, kernel = _windows_to_channels(x, kernel, disjoint)
    for axis, (folded, stride, pad) in enumerate(zip(disjoint, strides, padding, strict=True)):
        x, kernel = _im2col(x, kernel, axis, 1 if folded else stride, pad)
    return x @ kernel.reshape(kernel.shape[-2:])


def _windows_to_channels(
    x: jax.Array, kernel: jax.Array, disjoint: Sequence[bool]
) -> tuple[jax.Array, jax.Array]:
    """Move the positions within windows to the channel axis, along grid axes where windows do not overlap.

    `disjoint` states for each grid axis whether windows do not overlap.
    """
    batch, *grid, _ = x.shape
    *window, inputs, outputs = kernel.shape
    sides = [k if folded else 1 for k, folded in zip(window, disjoint, strict=True)]
    counts = [n // side for n, side in zip(grid, sides, strict=True)]
    x = x[:, *(slice(n * side) for n, side in zip(counts, sides, strict=True))]
    pairs = [size for pair in zip(counts, sides, strict=True) for size in pair]
    x = x.reshape(batch, *pairs, inputs)
    rank = len(grid)
    x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    within = [axis for axis in range(rank) if disjoint[axis]]
    across = [axis for axis in range(rank) if not disjoint[axis]]
    kernel = kernel.transpose(*across, *within, rank, rank + 1)
    left = [1 if folded else k for k, folded in zip(window, disjoint, strict=True)]
    return x.reshape(batch, *counts, -1), kernel.reshape(*left, -1, outputs)


def _im2col(x: jax.Array, kernel: jax.Array, axis: int, stride: int, pad: int) -> tuple[jax.Array, jax.Array]:
    """Copy the positions that windows read along one grid axis to the channel axis."""
    size, along = kernel.shape[axis], axis + 1
    x = jnp.pad(x, [(pad, pad) if i == along else (0, 0) for i in range(x.ndim)])
    last = (x.shape[along] - size) // stride * stride
    read = [lax.slice_in_dim(x, first, first + last + 1, stride, along) for first in range(size)]
    kernel = jnp.moveaxis(kernel, axis, -3)
    kernel = kernel.reshape(*kernel.shape[:-3], -1, kernel.shape[-1])
    return jnp.concatenate(read, axis=-1), jnp.expand_dims(kernel, axis)
