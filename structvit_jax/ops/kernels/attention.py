"""What attention kernels share: one gradient rule, for heads and channels merged in one axis.

The forward pass keeps its output and, for every query, the logarithm of its sum of exponentials ("lse"); the
backward pass computes the weights again, block by block. Heads and channels are merged because TPUs would pad
both axes wherever such an array is kept.
"""

from __future__ import annotations

import functools
from typing import Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # name of what the backward pass needs of an attention kernel, for jax.checkpoint

Gradients = tuple[jax.Array, jax.Array, jax.Array]


class Forward(Protocol):
    """query [batch, N, heads·channels]; key, value [batch, M, heads·channels] -> output like query, and lse
    [batch, heads, N]."""

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int
    ) -> tuple[jax.Array, jax.Array]: ...


class Backward(Protocol):
    """Gradients of query, key and value, from the results of `Forward` and the output's cotangent."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        output: jax.Array,
        cotangent: jax.Array,
        lse: jax.Array,
        *,
        heads: int,
    ) -> Gradients: ...


class Attention(Protocol):
    """A replacement for `structvit_jax.ops.attention`."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array: ...


def with_gradients(forward: Forward, backward: Backward) -> Attention:
    """Return attention [batch, length, heads, channels] with this forward and backward pass."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, heads: int) -> jax.Array:
        return attend_fwd(query, key, value, heads)[0]

    def attend_fwd(
        query: jax.Array, key: jax.Array, value: jax.Array, heads: int
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        output, lse = (checkpoint_name(x, SAVED) for x in forward(query, key, value, heads=heads))
        return output, (query, key, value, output, lse)

    def attend_bwd(heads: int, residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> Gradients:
        query, key, value, output, lse = residuals
        return backward(query, key, value, output, cotangent, lse, heads=heads)

    attend.defvjp(attend_fwd, attend_bwd)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        merged = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        return attend(*merged, query.shape[2]).reshape(query.shape)

    return attention
