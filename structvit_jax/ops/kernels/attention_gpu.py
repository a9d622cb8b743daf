"""Attention by cuDNN, through JAX."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from structvit_jax.ops.dispatch import current_device


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Pad odd lengths, which JAX refuses to train with: with a query whose result is dropped, or with a key
    beyond the sequence length."""
    rows, keys = query.shape[1], key.shape[1]
    lengths = jnp.full(len(key), keys, jnp.int32) if keys % 2 else None
    even = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (query, key, value))
    output = jax.nn.dot_product_attention(*even, implementation="cudnn", key_value_seq_lengths=lengths)
    return output[:, :rows]


def supports(query: jax.Array, *_: jax.Array | None) -> bool:
    """Return whether cuDNN has attention for queries [..., channels]: half precision, Ampere or later."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0 and _is_ampere()


def _is_ampere() -> bool:
    """Return whether the GPU is NVIDIA's with compute capability 8.0 or later.

    It is that of the GPU in this process; without one, programs are compiled for the data-centre GPUs of
    `structvit_jax.performance.hardware`, which all are.
    """
    try:
        capability = getattr(jax.devices("gpu")[0], "compute_capability", "")  # "9.0"; AMD's is "gfx90a"
    except RuntimeError:
        return "NVIDIA" in current_device().kind
    return bool(re.fullmatch(r"\d+\.\d", capability)) and float(capability) >= 8.0
