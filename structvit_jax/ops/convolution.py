"""Dense and depthwise convolutions over 2-D and 3-D grids: cross-correlations with zero padding."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from structvit_jax.ops.dispatch import operation, require


def grid_strides(grid: Sequence[int], stride: int) -> tuple[int, ...]:
    """Return the strides per axis: `stride` in height and width, 1 in time."""
    return (1,) * (len(grid) - 2) + (stride, stride)


def same_padding(window: Sequence[int]) -> list[tuple[int, int]]:
    """Return the zeros on both sides that keep the centre of an odd window on the grid."""
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
    """Dense convolution.

    Args:
      x: [batch, *grid, inputs], grid (height, width) or (time, height, width).
      kernel: [*window, inputs, outputs].
      strides: per axis of the grid.
      padding: zeros on both sides, per axis of the grid.

    Returns:
      [batch, *grid', outputs].
    """
    numbers = channels_last(len(strides))
    return lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], dimension_numbers=numbers)


def _check(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, stride: int) -> None:
    layout = "should be [batch, *grid, channels] and [*window, channels, D] with a grid of two or three axes"
    fits = x.ndim in (4, 5) and kernel.ndim == x.ndim
    require(fits, f"depthwise_conv: x {x.shape} and kernel {kernel.shape} {layout}")
    *window, channels, planes = kernel.shape
    layout = "it should be [*window, channels, D]"
    fits = channels == x.shape[-1]
    require(fits, f"depthwise_conv: kernel {kernel.shape} does not fit {x.shape[-1]} channels; {layout}")
    if bias is not None:
        layout = f"does not fit kernel {kernel.shape}; it should be [channels, D]"
        require(bias.shape == (channels, planes), f"depthwise_conv: bias {bias.shape} {layout}")
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
    """Convolve each channel with its own D kernels, with zero padding (k - 1) / 2.

    Args:
      x: [batch, *grid, channels], grid (height, width) or (time, height, width).
      kernel: [*window, channels, D], odd windows.
      bias: [channels, D].
      stride: spatial stride; window centres lie at 0, S, 2S, ... in height and width, and on every frame.

    Returns:
      [batch, D, *grid', channels] in x's type, a plane per kernel as attention over D·N' keys reads them;
      grid' is ceil(n / stride) in space.

    Raises:
      ValueError: ranks or channels that do not fit, an even window, or a stride below one.
    """
    *window, channels, planes = kernel.shape
    out = lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype).reshape(*window, 1, channels * planes),
        grid_strides(window, stride),
        same_padding(window),
        dimension_numbers=channels_last(len(window)),
        feature_group_count=channels,
    )
    out = jnp.moveaxis(out.reshape(*out.shape[:-1], channels, planes), -1, 1)
    return add_bias(out, bias)


def add_bias(out: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add bias [channels, D] to [batch, D, *grid, channels]."""
    if bias is None:
        return out
    return out + bias.astype(out.dtype).T.reshape(-1, *(1,) * (out.ndim - 3), out.shape[-1])
