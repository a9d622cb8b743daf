"""Dense and depthwise convolutions over 2-D and 3-D grids, with zero padding and without flipped kernels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from structvit_jax.ops.dispatch import operation, require


def grid_strides(grid: Sequence[int], stride: int) -> tuple[int, ...]:
    """Return the stride of each axis: `stride` in height and width, 1 in time."""
    return (1,) * (len(grid) - 2) + (stride, stride)


def same_padding(window: Sequence[int]) -> list[tuple[int, int]]:
    """Return the padding of each axis with which an odd window at stride 1 keeps the size of the grid."""
    return [((k - 1) // 2, (k - 1) // 2) for k in window]


def channels_last(axes: int) -> tuple[str, str, str]:
    """Return the dimension numbers of [batch, *grid, inputs], [*window, inputs, outputs], and the result."""
    names = "THW"[-axes:]
    return f"N{names}C", f"{names}IO", f"N{names}C"


@operation()
def convolve(
    x: Float[Array, "b *grid i"],
    kernel: Float[Array, "*window i o"],
    *,
    strides: Sequence[int],
    padding: Sequence[int],
) -> Float[Array, "b *_ o"]:
    """Compute a dense convolution.

    Args:
      x: [batch, *grid, inputs]; the grid is (height, width) or (time, height, width).
      kernel: [*window, inputs, outputs].
      strides: one per axis of the grid.
      padding: number of zeros on either side, one per axis of the grid.

    Returns:
      [batch, *grid', outputs].
    """
    numbers = channels_last(len(strides))
    return lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], dimension_numbers=numbers)


def _check(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, stride: int) -> None:
    layout = "should be [batch, *grid, channels] and [*window, channels, D] with a grid of two or three axes"
    fits = x.ndim in (4, 5) and kernel.ndim == x.ndim
    require(fits, f"depthwise_conv: x {x.shape} and kernel {kernel.shape} {layout}")
    *window, channels, multiplier = kernel.shape
    layout = "it should be [*window, channels, D]"
    fits = channels == x.shape[-1]
    require(fits, f"depthwise_conv: kernel {kernel.shape} does not fit {x.shape[-1]} channels; {layout}")
    if bias is not None:
        layout = f"does not fit kernel {kernel.shape}; it should be [channels, D]"
        require(bias.shape == (channels, multiplier), f"depthwise_conv: bias {bias.shape} {layout}")
    odd = all(k % 2 for k in window)
    require(odd, f"depthwise_conv: window {tuple(window)} has an even side; use odd ones")
    require(stride >= 1, f"depthwise_conv: stride {stride} is below one")


@operation(check=_check)
def depthwise_conv(
    x: Float[Array, "b *grid c"],
    kernel: Float[Array, "*window c d"],
    bias: Float[Array, "c d"] | None = None,
    *,
    stride: int = 1,
) -> Float[Array, "b d *_ c"]:
    """Convolve each channel with its own D kernels, with zero padding of (k - 1) / 2.

    Args:
      x: [batch, *grid, channels]; the grid is (height, width) or (time, height, width).
      kernel: [*window, channels, D]; window sides are odd.
      bias: [channels, D].
      stride: spatial stride; window centres lie at 0, S, 2S, ... in height and width, and on every frame.

    Returns:
      [batch, D, *grid', channels] in the dtype of x. grid' has ceil(n / stride) positions along a spatial
      axis of length n. D comes before the grid, so that a reshape gives the D·N' keys of attention.

    Raises:
      ValueError: ranks or channels do not match, a window side is even, or the stride is below one.
    """
    *window, channels, multiplier = kernel.shape
    out = lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype).reshape(*window, 1, channels * multiplier),
        grid_strides(window, stride),
        same_padding(window),
        dimension_numbers=channels_last(len(window)),
        feature_group_count=channels,
    )
    out = jnp.moveaxis(out.reshape(*out.shape[:-1], channels, multiplier), -1, 1)
    return add_bias(out, bias)


def add_bias(out: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add bias [channels, D] to [batch, D, *grid, channels]."""
    if bias is None:
        return out
    return out + bias.astype(out.dtype).T.reshape(-1, *(1,) * (out.ndim - 3), out.shape[-1])
