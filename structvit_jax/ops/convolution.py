"""Dense convolution of images, video and feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from jax import lax
from jaxtyping import Array, Float

from structvit_jax.ops.dispatch import operation


@operation()
def convolve(
    x: Float[Array, "b *grid i"],
    kernel: Float[Array, "*window i o"],
    *,
    strides: Sequence[int],
    padding: Sequence[int],
) -> Float[Array, "b *_ o"]:
    """Cross-correlation with zero padding.

    Args:
      x: [batch, *grid, inputs], grid (height, width) or (time, height, width).
      kernel: [*window, inputs, outputs].
      strides: per axis of the grid.
      padding: zeros on both sides, per axis of the grid.

    Returns:
      [batch, *grid', outputs].
    """
    axes = "THW"[-len(strides) :]
    numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], dimension_numbers=numbers)
