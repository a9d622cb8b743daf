"""The MLP (two linear layers with GELU between them) for TPUs in Pallas.

The hidden array is four times as wide as the others. It never leaves vector memory: the backward pass
recomputes it from the input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from structvit_jax.ops.kernels.pallas import Ref, call_kernel, dot, interpreted_elsewhere

_HIDDEN = 2**21  # bytes of the float32 hidden array of a grid step, which holds a few such arrays
_WORK = 8 * _HIDDEN  # bytes of the intermediate results of a grid step


def forward(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool) -> jax.Array:
    """Apply the MLP to x [rows, inputs]; the weights are (kernel1, bias1, kernel2, bias2)."""
    kernel1, bias1, kernel2, bias2 = weights
    params = kernel1, bias1[None], kernel2, bias2[None]
    tile, outputs = _tile(x, kernel1), kernel2.shape[1]
    (y,) = call_kernel(
        _forward,
        (x, *params),
        grid=(pl.cdiv(len(x), tile),),
        in_specs=[_rows(tile, x.shape[1]), *map(_whole, params)],
        out_specs=[_rows(tile, outputs)],
        out_shape=[jax.ShapeDtypeStruct((len(x), outputs), x.dtype)],
        semantics=["parallel"],
        work=_WORK,
        interpret=interpret,
        name="mlp",
    )
    return y


def backward(
    x: jax.Array, cotangent: jax.Array, weights: Sequence[jax.Array], *, interpret: bool
) -> tuple[jax.Array, ...]:
    """Return the gradients of x, in the dtype of x, and of kernels and biases, in float32.

    The weights are (kernel1, bias1, kernel2); bias2 is not needed.
    """
    kernel1, bias1, kernel2 = weights
    params = kernel1, bias1[None], kernel2
    tile, outputs = _tile(x, kernel1), kernel2.shape[1]
    shapes = kernel1.shape, (1, *bias1.shape), kernel2.shape, (1, outputs)
    sums = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    d_x, d_kernel1, d_bias1, d_kernel2, d_bias2 = call_kernel(
        functools.partial(_backward, rows=len(x)),
        (x, cotangent, *params),
        grid=(pl.cdiv(len(x), tile),),
        in_specs=[_rows(tile, x.shape[1]), _rows(tile, outputs), *map(_whole, params)],
        out_specs=[_rows(tile, x.shape[1]), *map(_whole, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *sums],
        semantics=["arbitrary"],
        work=_WORK,
        interpret=interpret,
        name="mlp_gradient",
    )
    return d_x, d_kernel1, d_bias1[0], d_kernel2, d_bias2[0]


def _make(interpret: bool) -> Callable[..., jax.Array]:
    @jax.custom_vjp
    def mlp(x: jax.Array, *weights: jax.Array) -> jax.Array:
        # The weights may have a wider dtype than x. Their gradients have the same dtype as they.
        rows, weights = x.reshape(-1, x.shape[-1]), tuple(w.astype(x.dtype) for w in weights)
        return forward(rows, weights, interpret=interpret).reshape(*x.shape[:-1], -1)

    def mlp_fwd(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return mlp(x, *weights), (x, *weights)

    def mlp_bwd(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        x, *weights = residuals
        rows, d_rows = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
        narrow = [w.astype(x.dtype) for w in weights[:3]]
        d_x, *sums = backward(rows, d_rows, narrow, interpret=interpret)
        return d_x.reshape(x.shape), *(d.astype(w.dtype) for d, w in zip(sums, weights, strict=True))

    mlp.defvjp(mlp_fwd, mlp_bwd)
    return mlp


mlp = interpreted_elsewhere(_make)


def _tile(x: jax.Array, kernel1: jax.Array) -> int:
    """Return the rows of x per grid step: all, or a multiple of 16 (one bfloat16 register)."""
    most = max(1, _HIDDEN // (4 * kernel1.shape[1]) // 16) * 16
    return min(len(x), most)


def _rows(tile: int, width: int) -> pl.BlockSpec:
    """Return the block spec of `tile` rows per grid step."""
    return pl.BlockSpec((tile, width), lambda i: (i, 0))


def _whole(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Return the block spec of an array of which every grid step uses all."""
    return pl.BlockSpec(array.shape, lambda i: (0, 0))


def _forward(
    x_ref: Ref, kernel1_ref: Ref, bias1_ref: Ref, kernel2_ref: Ref, bias2_ref: Ref, y_ref: Ref
) -> None:
    hidden = dot(x_ref[...], kernel1_ref[...], (1, 0)) + bias1_ref[...].astype(jnp.float32)
    active = 0.5 * hidden * (1 + lax.erf(hidden * math.sqrt(0.5)))
    y = dot(active.astype(x_ref.dtype), kernel2_ref[...], (1, 0)) + bias2_ref[...].astype(jnp.float32)
    y_ref[...] = y.astype(y_ref.dtype)


def _backward(
    x_ref: Ref, dy_ref: Ref, kernel1_ref: Ref, bias1_ref: Ref, kernel2_ref: Ref,
    dx_ref: Ref, d_kernel1_ref: Ref, d_bias1_ref: Ref, d_kernel2_ref: Ref, d_bias2_ref: Ref, *, rows: int,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        for ref in (d_kernel1_ref, d_bias1_ref, d_kernel2_ref, d_bias2_ref):
            ref[...] = jnp.zeros_like(ref)

    x, dy = x_ref[...], dy_ref[...]
    tile = len(x)
    if rows % tile:  # the last tile extends beyond the arrays, where values are undefined
        inside = lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < rows - pl.program_id(0) * tile
        x, dy = jnp.where(inside, x, 0), jnp.where(inside, dy, 0)
    hidden = dot(x, kernel1_ref[...], (1, 0)) + bias1_ref[...].astype(jnp.float32)
    cumulative = 0.5 * (1 + lax.erf(hidden * math.sqrt(0.5)))
    slope = cumulative + hidden * jnp.exp(-0.5 * hidden * hidden) / math.sqrt(2 * math.pi)
    d_kernel2_ref[...] += dot((hidden * cumulative).astype(x.dtype), dy, (0, 0))
    d_bias2_ref[...] += dy.astype(jnp.float32).sum(axis=0, keepdims=True)
    d_hidden = dot(dy, kernel2_ref[...], (1, 1)) * slope
    d_bias1_ref[...] += d_hidden.sum(axis=0, keepdims=True)
    d_hidden = d_hidden.astype(x.dtype)
    d_kernel1_ref[...] += dot(x, d_hidden, (0, 0))
    dx_ref[...] = dot(d_hidden, kernel1_ref[...], (1, 1)).astype(dx_ref.dtype)
