"""Linear layers, MLP and layer normalisation on reshaped arrays, and an MLP that stores fewer arrays.

Some compilers are slow for arrays with many axes. JAX's gradients of GELU store several hidden arrays, which
are four times as wide as the others. The MLP here stores only the input of GELU for the backward pass, and
recomputes its output and its derivative.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.pointwise import gelu, layer_norm, linear


def linear_of_rows(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Apply a linear layer to x as a matrix, for which the CPU compiler transposes gradients faster."""
    rows = x.reshape(-1, x.shape[-1])
    return linear.definition(rows, kernel, bias).reshape(*x.shape[:-1], -1)


def layer_norm_of_rows(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> jax.Array:
    """Normalise x as [batch, N, channels].

    The GPU compiler tries few tile sizes for such an array, but thousands for one with a grid.
    """
    rows = x.reshape(len(x), -1, x.shape[-1])
    return layer_norm.definition(rows, scale, bias, epsilon=epsilon).reshape(x.shape)


def mlp_recomputing_gelu(x: jax.Array, *weights: jax.Array) -> jax.Array:
    """Apply the MLP to x as a matrix, and store one hidden array for the backward pass."""
    rows = x.reshape(-1, x.shape[-1])
    return _mlp(rows, *weights).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _mlp(x: jax.Array, *weights: jax.Array) -> jax.Array:
    return _forward(x, *weights)[0]


def _forward(
    x: jax.Array, kernel1: jax.Array, bias1: jax.Array, kernel2: jax.Array, bias2: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    hidden = x @ kernel1 + bias1
    return gelu(hidden) @ kernel2 + bias2, (x, hidden, kernel1, kernel2)


def _backward(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, hidden, kernel1, kernel2 = residuals
    d_hidden = ((cotangent @ kernel2.T) * _slope(hidden)).astype(x.dtype)
    d_kernel2, d_bias2 = _linear_gradients(gelu(hidden), cotangent, kernel2)
    d_kernel1, d_bias1 = _linear_gradients(x, d_hidden, kernel1)
    return d_hidden @ kernel1.T, d_kernel1, d_bias1, d_kernel2, d_bias2


_mlp.defvjp(_forward, _backward)


def _linear_gradients(x: jax.Array, cotangent: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the kernel and the bias of a linear layer.

    On CPUs, x.T @ cotangent transposes x, and (cotangent.T @ x).T transposes the result. This function
    chooses the smaller array.
    """
    rows, outputs = cotangent.shape
    if x.shape[-1] < outputs or rows < outputs:
        d_kernel = x.T @ cotangent
    else:  # without the barrier, the compiler would exchange the factors again
        d_kernel = lax.optimization_barrier(cotangent.T @ x).T
    exact = jnp.promote_types(x.dtype, jnp.float32)
    return d_kernel.astype(kernel.dtype), cotangent.sum(axis=0, dtype=exact).astype(kernel.dtype)


def _slope(x: jax.Array) -> jax.Array:
    """Return the derivative of GELU, in at least float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
