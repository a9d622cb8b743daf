"""Attention for TPUs, in Pallas: the queries of an example stay in vector memory, its keys stream through.

Forward and backward, queries, keys and values are read once and outputs are written once. The products of
queries and keys never leave vector memory. They have keys along sublanes and queries along lanes: maxima and
sums over keys then combine whole registers, and the statistics of queries are rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from structvit_jax.ops.kernels.attention_xla import Attention, Gradients, Residuals, with_gradients
from structvit_jax.ops.kernels.pallas import Ref, call_kernel, dot, interpreted_elsewhere

_PRODUCTS = 2 * 2**20  # bytes of queries x keys, in float32; a step holds a few such arrays
_SEMANTICS = ("parallel", "arbitrary")
_WORK = 8 * _PRODUCTS  # bytes of a step's intermediate results


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the output, like query, and lse, float32; see `attention_xla.with_gradients`."""
    batch, count, width = query.shape
    key, value = (_cut(x, count) for x in (key, value))
    row, plane, stats = _blocks(query, key, heads)
    return call_kernel(
        functools.partial(_forward, heads=heads),
        (query, key, value),
        grid=(batch, key.shape[1]),
        in_specs=[row, plane, plane],
        out_specs=[row, stats],
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
    """Return the gradients of query, key and value, in their types."""
    query, key, value, output, lse = residuals
    shape = key.shape
    batch, count, width = query.shape
    key, value = (_cut(x, count) for x in (key, value))
    row, plane, stats = _blocks(query, key, heads)
    d_query, d_key, d_value = call_kernel(
        functools.partial(_backward, heads=heads),
        (query, key, value, output, cotangent, lse),
        grid=(batch, key.shape[1]),
        in_specs=[row, plane, plane, row, row, stats],
        out_specs=[row, plane, plane],
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


def _cut(keys: jax.Array, queries: int) -> jax.Array:
    """[batch, M, width] -> [batch, planes, M / planes, width], the fewest planes that fit the limit."""
    total = keys.shape[1]
    planes = next(p for p in range(1, total + 1) if total % p == 0 and total // p * queries * 4 <= _PRODUCTS)
    return keys.reshape(keys.shape[0], planes, total // planes, -1)


def _blocks(query: jax.Array, key: jax.Array, heads: int) -> tuple[pl.BlockSpec, ...]:
    """Return the blocks of a step: all queries of an example, a plane of its keys, statistics of queries."""
    count, width = query.shape[1:]
    row = pl.BlockSpec((1, count, width), lambda b, _: (b, 0, 0))
    plane = pl.BlockSpec((1, 1, *key.shape[2:]), lambda b, j: (b, j, 0, 0))
    return row, plane, pl.BlockSpec((1, heads, count), lambda b, _: (b, 0, 0))


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
        kept = jnp.exp(old - new)
        top[row] = new
        total[row] = total[row] * kept + weights.sum(axis=0, keepdims=True)
        v = v_ref[0, 0, :, part]
        sums[part] = sums[part] * kept + dot(v, weights.astype(v.dtype), (0, 0))  # [channels, N]

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
