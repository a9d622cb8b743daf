"""Operations that treat every position alone: linear layer, GELU, MLP and layer normalisation."""

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
    """Compute x kernel + bias along the last axis: [batch, ..., inputs] -> [batch, ..., outputs]."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


def gelu(x: Float[Array, " *_"]) -> Float[Array, " *_"]:
    """Compute the exact GELU, x Φ(x), in at least float32; return it in the dtype of x.

    Φ is the cumulative distribution function of the normal distribution. This is PyTorch's default GELU.
    """
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
    """Compute gelu(x kernel1 + bias1) kernel2 + bias2: [batch, ..., inputs] -> [batch, ..., outputs]."""
    return gelu(x @ kernel1 + bias1) @ kernel2 + bias2


@operation()
def layer_norm(
    x: Float[Array, "b *_ c"], scale: Float[Array, " c"], bias: Float[Array, " c"], *, epsilon: float
) -> Float[Array, "b *_ c"]:
    """Compute (x - mean) / sqrt(variance + epsilon) scale + bias over the channels of [batch, ..., channels].

    The computation is in at least float32, with the mean before the variance. The result has the dtype of x.
    """
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = exact.mean(axis=-1, keepdims=True)
    variance = jnp.square(exact - mean).mean(axis=-1, keepdims=True)
    return ((x - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias).astype(x.dtype)
