"""Softmax attention of N queries over M keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from structvit_jax.ops.dispatch import operation, require


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    fits = query.ndim == 4 and key.shape == (query.shape[0], *key.shape[1:2], *query.shape[2:])
    require(
        fits and value.shape == key.shape,
        f"attention: query {query.shape}, key {key.shape} and value {value.shape} should be"
        " [batch, length, heads, channels], with one length for keys and values",
    )


@operation(check=_check)
def attention(
    query: Float[Array, "b n h c"], key: Float[Array, "b m h c"], value: Float[Array, "b m h c"]
) -> Float[Array, "b n h c"]:
    """Compute softmax(query keyᵀ / sqrt(channels)) value for every head.

    Args:
      query: [batch, N, heads, channels].
      key, value: [batch, M, heads, channels].

    Returns:
      [batch, N, heads, channels], in the dtype of the arguments. The softmax is computed in at least float32.

    Raises:
      ValueError: shapes do not match.
    """
    exact = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bnhc,bmhc->bhnm", query, key, preferred_element_type=exact)
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5)
    return jnp.einsum("bhnm,bmhc->bnhc", weights.astype(value.dtype), value)
