"""Two linear layers with an exact GELU between them, that keep one hidden array for the backward pass.

Differentiated plainly, GELU keeps several arrays of the hidden width, which is four times that of all others;
here its output and its slope are computed again from its input.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax


def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) with the normal distribution's Φ, as PyTorch computes it; in float32 at least, in x's dtype."""
    return _gelu(x).astype(x.dtype)


@jax.custom_vjp
def mlp(
    x: jax.Array, kernel1: jax.Array, bias1: jax.Array, kernel2: jax.Array, bias2: jax.Array
) -> jax.Array:
    """gelu(x kernel1 + bias1) kernel2 + bias2.

    Args:
      x: [..., inputs].
      kernel1, bias1: [inputs, hidden] and [hidden].
      kernel2, bias2: [hidden, outputs] and [outputs].

    Returns:
      [..., outputs].
    """
    return _forward(x, kernel1, bias1, kernel2, bias2)[0]


def _forward(x, kernel1, bias1, kernel2, bias2):
    hidden = x @ kernel1 + bias1
    return gelu(hidden) @ kernel2 + bias2, (x, hidden, kernel1, kernel2)


def _backward(residuals, cotangent):
    x, hidden, kernel1, kernel2 = residuals
    d_hidden = ((cotangent @ kernel2.T) * _slope(hidden)).astype(x.dtype)
    d_kernel2, d_bias2 = _of_linear(gelu(hidden), cotangent, kernel2)
    d_kernel1, d_bias1 = _of_linear(x, d_hidden, kernel1)
    return d_hidden @ kernel1.T, d_kernel1, d_bias1, d_kernel2, d_bias2


mlp.defvjp(_forward, _backward)


def _of_linear(x, cotangent, kernel):
    """Gradients of a linear layer's kernel and bias. The left factor is the narrow one: CPUs transpose it."""
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] < cotangent.shape[-1]:
        d_kernel = jnp.tensordot(x, cotangent, (rows, rows))
    else:
        d_kernel = jnp.tensordot(cotangent, x, (rows, rows)).T
    return d_kernel.astype(kernel.dtype), cotangent.sum(axis=rows, dtype=_exact(x)).astype(kernel.dtype)


def _exact(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _gelu(x):
    x = x.astype(_exact(x))
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def _slope(x):
    """The derivative of gelu."""
    x = x.astype(_exact(x))
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
