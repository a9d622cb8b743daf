"""Depthwise convolution by XLA's grouped convolution, and the gradient rule of all depthwise kernels.

XLA's own gradients of the grouped convolution take minutes to compile for TPUs, and use layouts that are
mostly padding: in 3-D with D = 4 they move a thousand times the bytes of the gradients here.

Arrays are x [batch, *grid, channels], kernel [*window, channels, D] and cotangent [batch, D, *grid',
channels]. The channel multiplier D is the number of kernels per channel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.convolution import (
    add_bias,
    channels_last,
    depthwise_conv,
    grid_strides,
    same_padding,
)

Depthwise = Callable[..., jax.Array]  # (x, kernel, bias, stride=) -> [batch, D, *grid', channels]
# (x, kernel, cotangent, stride) -> the gradient of x or of kernel, or both
Gradient = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
Gradients = Callable[[jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def with_gradients(
    forward: Callable[..., jax.Array], gradients: Gradients, *, adds_bias: bool = False
) -> Depthwise:
    """Combine a forward pass and gradients to a depthwise convolution.

    The kernel and the bias may have a wider dtype than x. Their gradients have the same dtype as they.

    Args:
      forward: (x, kernel, stride) -> output, or (x, kernel, bias, stride) -> output if `adds_bias`.
      gradients: (x, kernel, cotangent, stride) -> gradients of x and kernel.
      adds_bias: whether `forward` adds the bias.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def convolve(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, stride: int) -> jax.Array:
        kernel, bias = kernel.astype(x.dtype), None if bias is None else bias.astype(x.dtype)
        if adds_bias:
            return forward(x, kernel, bias, stride)
        return add_bias(forward(x, kernel, stride), bias)

    def convolve_fwd(
        x: jax.Array, kernel: jax.Array, bias: jax.Array | None, stride: int
    ) -> tuple[jax.Array, Any]:
        return convolve(x, kernel, bias, stride), (x, kernel, bias)

    def convolve_bwd(stride: int, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
        x, kernel, bias = residuals
        d_bias = None
        if bias is not None:
            positions = (0, *range(2, cotangent.ndim - 1))
            d_bias = cotangent.sum(positions, dtype=accumulator(cotangent)).astype(bias.dtype).T
        return *gradients(x, kernel, cotangent, stride), d_bias

    convolve.defvjp(convolve_fwd, convolve_bwd)
    traced_once = jax.jit(convolve, static_argnums=3)  # traced once for all blocks with the same shapes

    def depthwise(
        x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, stride: int
    ) -> jax.Array:
        return traced_once(x, kernel, bias, stride)

    return depthwise


def separate(input_gradient: Gradient, kernel_gradient: Gradient) -> Gradients:
    """Combine two functions, which compute one gradient each, to a function that returns both."""

    def gradients(
        x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
    ) -> tuple[jax.Array, jax.Array]:
        d_x = input_gradient(x, kernel.astype(x.dtype), cotangent, stride)
        return d_x, kernel_gradient(x, kernel, cotangent, stride)

    return gradients


def grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Compute the definition, XLA's grouped convolution."""
    return depthwise_conv.definition(x, kernel, stride=stride)


def grouped_input_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Convolve the cotangent of every kernel with the reversed window, and add up the results."""
    strides = grid_strides(x.shape[1:-1], stride)
    padding = padding_of_gradient(x, kernel, cotangent, strides)
    taps = jnp.flip(kernel, axis=tuple(range(len(strides))))
    total: jax.Array | float = 0.0
    for d in range(kernel.shape[-1]):
        part = lax.conv_general_dilated(
            cotangent[:, d],
            taps[..., None, :, d],
            (1,) * len(strides),
            padding,
            lhs_dilation=strides,
            dimension_numbers=channels_last(len(strides)),
            feature_group_count=x.shape[-1],
        )
        total += part.astype(accumulator(x))
    return jnp.asarray(total, x.dtype)


def grouped_kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """For every tap, sum the products of inputs and cotangent over all positions."""
    window, accumulate = kernel.shape[:-2], accumulator(x)
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0)])
    cotangent, positions = cotangent.astype(accumulate), tuple(range(x.ndim - 1))
    strides, grid = grid_strides(window, stride), cotangent.shape[2:-1]
    taps = [
        (shift(x, offset, grid, strides).astype(accumulate) * cotangent[:, d]).sum(positions)
        for offset in itertools.product(*map(range, window))
        for d in range(kernel.shape[-1])
    ]
    stacked = jnp.stack(taps).reshape(*window, kernel.shape[-1], -1)
    return jnp.swapaxes(stacked, -1, -2).astype(kernel.dtype)


def library_kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Return XLA's own gradient of the grouped convolution."""
    _, pull = jax.vjp(lambda kernel: grouped(x, kernel.astype(x.dtype), stride), kernel)
    return pull(cotangent)[0]


def padding_of_gradient(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding of the dilated cotangent for a convolution with the reversed window."""
    sizes = zip(x.shape[1:-1], cotangent.shape[2:-1], kernel.shape[:-2], strides, strict=True)
    return [((k - 1) // 2, (k - 1) // 2 + n - (m - 1) * s - 1) for n, m, k, s in sizes]


def shift(padded: jax.Array, offset: Sequence[int], grid: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Return the values of [batch, *padded, channels] that the tap at `offset` reads."""
    end = [o + (n - 1) * s + 1 for o, n, s in zip(offset, grid, strides, strict=True)]
    return lax.slice(padded, (0, *offset, 0), (len(padded), *end, padded.shape[-1]), (1, *strides, 1))


def accumulator(x: jax.Array) -> jnp.dtype:
    """Return the dtype for sums: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
