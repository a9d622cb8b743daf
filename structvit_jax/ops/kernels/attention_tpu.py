"""Attention for TPUs in Pallas: all queries of an example stay in vector memory, blocks of keys are streamed.

Both passes read queries, keys and values once and write their results once. Logits never leave vector memory.
They have keys along sublanes and queries along lanes, so that maxima and sums over keys combine whole
registers, and the statistics of queries (maximum, sum, lse) are rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from structvit_jax.ops.kernels.attention_xla import Attention, Gradients, Residuals, with_gradients
from structvit_jax.ops.kernels.pallas import Ref, call_kernel, dot, interpreted_elsewhere

_LOGITS = 2 * 2**20  # bytes of the float32 logits of a grid step, which holds a few such arrays
_SEMANTICS = ("parallel", "arbitrary")
_WORK = 8 * _LOGITS  # bytes of the intermediate results of a grid step


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the output, in the dtype of query, and lse in float32 (see `attention_xla.with_gradients`)."""
    batch, count, width = query.shape
    key, value = (_split_keys(x, count) for x in (key, value))
    queries, keys, stats = _block_specs(query, key, heads)
    return call_kernel(
        functools.partial(_forward, heads=heads),
        (query, key, value),
        grid=(batch, key.shape[1]),
        in_specs=[queries, keys, keys],
        out_specs=[queries, stats],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, count), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((width, count), jnp.float32),
            pltpu.VMEM((heads, count), jnp.float32),
            pltpu.VMEM((heads, count), jnp.float32),
        ],
        semantics=_SEMANTICS,
        work=_WORK,
        interpret=interpret,
        name="struct_attention",
    )


def backward(residuals: Residuals, cotangent: jax.Array, *, heads: int, interpret: bool) -> Gradients:
    """Return the gradients of query, key and value, in their dtypes."""
    query, key, value, output, lse = residuals
    shape = key.shape
    batch, count, width = query.shape
    key, value = (_split_keys(x, count) for x in (key, value))
    queries, keys, stats = _block_specs(query, key, heads)
    d_query, d_key, d_value = call_kernel(
        functools.partial(_backward, heads=heads),
        (query, key, value, output, cotangent, lse),
        grid=(batch, key.shape[1]),
        in_specs=[queries, keys, keys, queries, queries, stats],
        out_specs=[queries, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        scratch_shapes=[
            pltpu.VMEM((width, count), jnp.float32),
            pltpu.VMEM((heads, count), jnp.float32),
        ],
        semantics=_SEMANTICS,
        work=_WORK,
        interpret=interpret,
        name="struct_attention_gradient",
    )
    return d_query, d_key.reshape(shape), d_value.reshape(shape)


def _make(interpret: bool) -> Attention:
    return with_gradients(
        functools.partial(forward, interpret=interpret), functools.partial(backward, interpret=interpret)
    )


attention = interpreted_elsewhere(_make)


def _split_keys(keys: jax.Array, queries: int) -> jax.Array:
    """Split keys into as few blocks as fit: [batch, M, width] -> [batch, blocks, M / blocks, width]."""
    total = keys.shape[1]
    blocks = next(n for n in range(1, total + 1) if total % n == 0 and total // n * queries * 4 <= _LOGITS)
    return keys.reshape(keys.shape[0], blocks, total // blocks, -1)


def _block_specs(query: jax.Array, key: jax.Array, heads: int) -> tuple[pl.BlockSpec, ...]:
    """Return the blocks of a grid step: all queries of an example, one block of keys, query statistics."""
    count, width = query.shape[1:]
    queries = pl.BlockSpec((1, count, width), lambda b, _: (b, 0, 0))
    keys = pl.BlockSpec((1, 1, *key.shape[2:]), lambda b, j: (b, j, 0, 0))
    return queries, keys, pl.BlockSpec((1, heads, count), lambda b, _: (b, 0, 0))


def _forward(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    o_ref: Ref,
    lse_ref: Ref,
    sums: Ref,
    top: Ref,
    total: Ref,
    *,
    heads: int,
) -> None:
    channels = q_ref.shape[-1] // heads

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)

    for h in range(heads):
        part, row = slice(h * channels, (h + 1) * channels), slice(h, h + 1)
        logits = dot(k_ref[0, 0, :, part], q_ref[0, :, part], (1, 1)) * channels**-0.5  # [keys, N]
        old = top[row]
        new = jnp.maximum(old, logits.max(axis=0, keepdims=True))
        weights = jnp.exp(logits - new)
        decay = jnp.exp(old - new)
        top[row] = new
        total[row] = total[row] * decay + weights.sum(axis=0, keepdims=True)
        v = v_ref[0, 0, :, part]
        sums[part] = sums[part] * decay + dot(v, weights.astype(v.dtype), (0, 0))  # [channels, N]

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        for h in range(heads):
            part, row = slice(h * channels, (h + 1) * channels), slice(h, h + 1)
            o_ref[0, :, part] = (sums[part] / total[row]).T.astype(o_ref.dtype)
        lse_ref[0] = top[...] + jnp.log(total[...])


def _backward(
    q_ref: Ref, k_ref: Ref, v_ref: Ref, o_ref: Ref, do_ref: Ref, lse_ref: Ref,
    dq_ref: Ref, dk_ref: Ref, dv_ref: Ref, sums: Ref, delta: Ref, *, heads: int,
) -> None:  # fmt: skip
    channels = q_ref.shape[-1] // heads
    scale = channels**-0.5

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        for h in range(heads):
            part = slice(h * channels, (h + 1) * channels)
            products = o_ref[0, :, part].astype(jnp.float32) * do_ref[0, :, part].astype(jnp.float32)
            delta[h : h + 1] = dot(jnp.ones((8, channels), jnp.float32), products, (1, 1))[:1]  # [1, N]

    for h in range(heads):
        part, row = slice(h * channels, (h + 1) * channels), slice(h, h + 1)
        q, do = q_ref[0, :, part], do_ref[0, :, part]
        k, v = k_ref[0, 0, :, part], v_ref[0, 0, :, part]
        weights = jnp.exp(dot(k, q, (1, 1)) * scale - lse_ref[0, row])  # [keys, N]
        dv_ref[0, 0, :, part] = dot(weights.astype(do.dtype), do, (1, 0)).astype(dv_ref.dtype)
        slopes = weights * (dot(v, do, (1, 1)) - delta[row]) * scale
        slopes = slopes.astype(q.dtype)
        dk_ref[0, 0, :, part] = dot(slopes, q, (1, 0)).astype(dk_ref.dtype)
        sums[part] = sums[part] + dot(k, slopes, (0, 0))  # [channels, N]

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        for h in range(heads):
            part = slice(h * channels, (h + 1) * channels)
            dq_ref[0, :, part] = sums[part].T.astype(dq_ref.dtype)
