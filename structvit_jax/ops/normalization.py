"""Layer normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from structvit_jax.ops.dispatch import operation


@operation()
def layer_norm(
    x: Float[Array, "b *_ c"], scale: Float[Array, " c"], bias: Float[Array, " c"], *, epsilon: float
) -> Float[Array, "b *_ c"]:
    """(x - mean) / sqrt(variance + epsilon) scale + bias, over the channels of [batch, ..., channels].

    Computed in float32 at least, in two passes; returned in x's type.
    """
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = exact.mean(axis=-1, keepdims=True)
    variance = jnp.square(exact - mean).mean(axis=-1, keepdims=True)
    return ((x - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias).astype(x.dtype)
