"""StructSA that keeps little for the backward pass."""

from __future__ import annotations

import functools

import jax

from structvit_jax.ops.kernels.attention import SAVED
from structvit_jax.ops.structsa import struct_attention


def recompute_convolved(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_kernels: jax.Array,
    value_kernels: jax.Array,
    *,
    stride: int,
) -> jax.Array:
    """Keep queries, keys, values and the results of attention for the backward pass.

    Convolved keys and values are D times larger than their inputs, so they are recomputed. Heads and channels
    are merged in what is kept, because TPUs would pad both axes.
    """
    heads = query.shape[-2]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
    def run(merged: list[jax.Array], *kernels: jax.Array) -> jax.Array:
        operands = (x.reshape(*x.shape[:-1], heads, -1) for x in merged)
        return struct_attention.definition(*operands, *kernels, stride=stride)

    merged = [x.reshape(*x.shape[:-2], -1) for x in (query, key, value)]
    return run(merged, key_kernels, value_kernels)
