"""Two linear layers with an exact GELU between them, that keep little for the backward pass.

Differentiated plainly, GELU keeps several arrays of the hidden width, which is four times that of all others;
here its output and its slope are computed again from its input, and on TPUs that from the layers' input.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops import feed_forward_tpu
from structvit_jax.ops.devices import Target, target

METHODS = ("auto", "plain", "pallas")


def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) with the normal distribution's Φ, as PyTorch computes it; in float32 at least, in x's dtype."""
    return _gelu(x).astype(x.dtype)


def mlp(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    *,
    method: str = "auto",
) -> jax.Array:
    """gelu(x kernel1 + bias1) kernel2 + bias2.

    Args:
      x: [batch, ..., inputs].
      kernel1, bias1: [inputs, hidden] and [hidden].
      kernel2, bias2: [hidden, outputs] and [outputs].
      method: "plain" keeps the hidden array for the backward pass; "pallas" are kernels for TPUs
        (interpreted elsewhere) that keep none; "auto" takes what suits the platform.

    Returns:
      [batch, ..., outputs].

    Raises:
      ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"mlp: method {method!r} is not one of {', '.join(METHODS)}")
    where = target()
    if method == "auto":
        method = "pallas" if where.platform == "tpu" and x.dtype != jnp.float64 else "plain"
    weights = kernel1, bias1, kernel2, bias2
    if method == "pallas":
        y = _fused(where, x.reshape(len(x), -1, x.shape[-1]), *weights)
    else:  # CPUs have a fast product of two matrices only
        y = _plain(_rows(x), *weights)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _plain(x, kernel1, bias1, kernel2, bias2):
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


_plain.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(where: Target, x, kernel1, bias1, kernel2, bias2):
    """x [batch, rows, inputs]."""

    def run(x, *weights):
        y = feed_forward_tpu.forward(_rows(x), *weights, interpret=where.interpret)
        return y.reshape(*x.shape[:-1], -1)

    return where.on_each_device(run, x, kernel1, bias1, kernel2, bias2, whole=4)


def _fused_forward(where, x, *weights):
    return _fused(where, x, *weights), (x, *weights)


def _fused_backward(where, residuals, cotangent):
    x, *weights = residuals

    def run(x, cotangent, *weights):
        rows = _rows(x), _rows(cotangent)
        d_x, *sums = feed_forward_tpu.backward(*rows, *weights, interpret=where.interpret)
        return d_x.reshape(x.shape), *(array[None] for array in sums)

    d_x, *parts = where.on_each_device(run, x, cotangent, *weights[:3], whole=3)
    return d_x, *(part.sum(axis=0).astype(like.dtype) for part, like in zip(parts, weights, strict=True))


_fused.defvjp(_fused_forward, _fused_backward)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _of_linear(x, cotangent, kernel):
    """Gradients of a linear layer's kernel and bias. CPUs transpose the left factor, or here the result: what
    is smallest."""
    rows, outputs = cotangent.shape
    if x.shape[-1] < outputs or rows < outputs:
        d_kernel = x.T @ cotangent
    else:  # the compiler would otherwise exchange the factors again
        d_kernel = lax.optimization_barrier(cotangent.T @ x).T
    return d_kernel.astype(kernel.dtype), cotangent.sum(axis=0, dtype=_exact(x)).astype(kernel.dtype)


def _exact(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _gelu(x):
    x = x.astype(_exact(x))
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def _slope(x):
    """The derivative of gelu."""
    x = x.astype(_exact(x))
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
