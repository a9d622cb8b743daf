"""Dense convolution of pictures and maps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.devices import target

_FEW = 8  # channels: so few would leave most of a register empty wherever channels lie along it


def convolve(x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[int]) -> jax.Array:
    """Cross-correlation. Windows that do not overlap along an axis become channels first, of pictures, and on
    CPUs of maps, too; on CPUs and GPUs all windows of video do.

    Args:
      x: [batch, *grid, inputs].
      kernel: [*window, inputs, outputs].
      strides: per axis.
      padding: zeros on both sides, per axis.

    Returns:
      [batch, *grid', outputs].
    """
    window = kernel.shape[:-2]
    platform = target().platform
    # CPUs: the gradients of XLA's convolution take eight times as long. GPUs: it puts channels before time,
    # and so does all that is computed from its result, up to where channels are reduced.
    whole = len(window) == 3 and platform != "tpu"
    if x.shape[-1] <= _FEW or platform == "cpu" or whole:
        apart = [k == s and not p for k, s, p in zip(window, strides, padding, strict=True)]
        x, kernel = _windows_to_channels(x, kernel, apart)
        strides = [1 if folded else s for folded, s in zip(apart, strides, strict=True)]
    if whole:
        for axis, (stride, zeros) in enumerate(zip(strides, padding, strict=True)):
            x, kernel = _im2col(x, kernel, axis, stride, zeros)
        strides, padding = (1, 1, 1), (0, 0, 0)
    if set(kernel.shape[:-2]) | set(strides) == {1} and not any(padding):
        return x @ kernel.reshape(kernel.shape[-2:])
    axes = "THW"[-len(window) :]
    numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], dimension_numbers=numbers)


def _windows_to_channels(x, kernel, apart):
    """Moves the places within windows to the channels, along the axes that lie `apart`."""
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


def _im2col(x, kernel, axis, stride, zeros):
    """Moves what windows see along an axis to the channels, as often as it is seen."""
    size, along = kernel.shape[axis], axis + 1
    x = jnp.pad(x, [(zeros, zeros) if i == along else (0, 0) for i in range(x.ndim)])
    last = (x.shape[along] - size) // stride * stride
    seen = [lax.slice_in_dim(x, first, first + last + 1, stride, along) for first in range(size)]
    kernel = jnp.moveaxis(kernel, axis, -3)
    kernel = kernel.reshape(*kernel.shape[:-3], -1, kernel.shape[-1])
    return jnp.concatenate(seen, axis=-1), jnp.expand_dims(kernel, axis)
