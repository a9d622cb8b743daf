"""Operations on arrays of another shape, for compilers that are slow at the one given."""

from __future__ import annotations

import jax

from structvit_jax.ops.feed_forward import linear
from structvit_jax.ops.normalization import layer_norm


def linear_of_rows(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Apply a linear layer to a matrix, of which the CPU compiler transposes the gradients fast."""
    rows = x.reshape(-1, x.shape[-1])
    return linear.definition(rows, kernel, bias).reshape(*x.shape[:-1], -1)


def layer_norm_of_rows(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> jax.Array:
    """Normalise [batch, N, channels]: for a grid the GPU compiler tries thousands of tiles, for rows few."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    return layer_norm.definition(rows, scale, bias, epsilon=epsilon).reshape(x.shape)
