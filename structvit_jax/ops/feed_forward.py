"""Linear layers, the exact GELU, and the two layers around it."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from structvit_jax.ops.dispatch import operation


@operation()
def linear(
    x: Float[Array, "b *_ i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"]
) -> Float[Array, "b *_ o"]:
    """x kernel + bias, along the last axis: [batch, ..., inputs] -> [batch, ..., outputs]."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


def gelu(x: Float[Array, " *_"]) -> Float[Array, " *_"]:
    """x Φ(x) with the normal distribution's Φ, as PyTorch computes it; in float32 at least, in x's type."""
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * exact * (1 + lax.erf(exact * math.sqrt(0.5)))).astype(x.dtype)


@operation()
def mlp(
    x: Float[Array, "b *_ i"],
    kernel1: Float[Array, "i k"],
    bias1: Float[Array, " k"],
    kernel2: Float[Array, "k o"],
    bias2: Float[Array, " o"],
) -> Float[Array, "b *_ o"]:
    """gelu(x kernel1 + bias1) kernel2 + bias2.

    Args:
      x: [batch, ..., inputs].
      kernel1, bias1: [inputs, hidden] and [hidden].
      kernel2, bias2: [hidden, outputs] and [outputs].

    Returns:
      [batch, ..., outputs].
    """
    return gelu(x @ kernel1 + bias1) @ kernel2 + bias2
