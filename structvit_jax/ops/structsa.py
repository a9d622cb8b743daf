"""StructSA: attention that reads the structure of query-key correlations.

Kim, Seo, Schmid, Cho, "Learning Correlation Structures for Vision Transformers", CVPR 2024.

With q_i one query, K_j and V_j the keys and values in the window centred on position j (zero outside
the grid), D kernels, and one softmax over all positions j and patterns d together:

    a_ijd   = softmax_(j,d)  sum_c q_ic sum_m H_K[m,c,d] K_jmc / sqrt(channels)      (eq. 2-3, app. A)
    kappa_ijmc = sum_d H_V[m,c,d] a_ijd                                     the dynamic kernel (eq. 5)
    y_ic    = sum_j sum_m kappa_ijmc V_jmc

A kernel that is one value for all channels (U_K, U_V) is the paper's dot-product form and its shared
aggregation; a value window of one is element aggregation (eq. 4); D = 1 is ConvSA, convolutional
projections as in CvT; no kernels at all is plain self-attention.

Two forms of the same numbers: "volume" is the definition above, with the correlation volume and the
dynamic kernels in memory; "factored" uses that convolution and dot product commute, so that both sums
over the window become depthwise convolutions of keys and values with channel multiplier D, and what
remains is ordinary attention over N'·D keys.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from structvit_jax.ops.attention import attention, attention_and_lse, attention_gradients, suited_method
from structvit_jax.ops.depthwise import depthwise_conv
from structvit_jax.ops.depthwise_forms import grid_strides, same_padding
from structvit_jax.ops.devices import target

METHODS = ("factored", "volume")


def struct_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_kernels: jax.Array | None = None,
    value_kernels: jax.Array | None = None,
    *,
    stride: int = 1,
    method: str = "factored",
) -> jax.Array:
    """Structural self-attention over a grid.

    Args:
      query, key, value: [batch, *grid, heads, channels]; grid (height, width) or (time, height, width).
      key_kernels, value_kernels: [*window, heads or 1, channels or 1, D], ones broadcast; odd windows,
        which may differ between the two. Both or neither; with neither it is plain self-attention.
      stride: spatial stride of the window centres 0, S, 2S, ...: ceil(n / S) per spatial axis.
      method: "factored" or "volume".

    Returns:
      [batch, *grid, heads, channels].

    Raises:
      ValueError: shapes that do not fit, one set of kernels without the other, kernels of different
        D, even windows, a stride without kernels.
    """
    check_arguments(query, key, value, key_kernels, value_kernels, stride, method)
    if method == "volume":
        queries = query.reshape(query.shape[0], -1, *query.shape[-2:])
        maps = _volume(queries, key, value, key_kernels, value_kernels, stride)
        return maps.output.reshape(query.shape)
    attention_method = suited_method(query)
    if key_kernels is None or value_kernels is None:
        return _attend(query, key, value, attention_method)
    if attention_method == "cudnn":  # which has its own gradients, and keeps keys and values for them
        with jax.named_scope("patterns"):
            key = convolve_patterns(key, key_kernels, stride=stride)
            value = convolve_patterns(value, value_kernels, stride=stride)
        return _attend(query, key, value, attention_method)
    heads, merged = query.shape[-2], (x.reshape(*x.shape[:-2], -1) for x in (query, key, value))
    kernels = (_per_channel(x, *query.shape[-2:]) for x in (key_kernels, value_kernels))
    return _factored(*merged, *kernels, heads, stride, attention_method, target()).reshape(query.shape)


class StructAttentionMaps(NamedTuple):
    """What StructSA computes for Q chosen queries. `channels or 1`: one where kernels are shared."""

    output: jax.Array  # [batch, Q, heads, channels]
    attention: jax.Array  # [batch, Q, heads, D, *grid']: sums to one over D and grid' together
    kappa: jax.Array  # [batch, Q, heads, *grid', *window, channels or 1]: the dynamic kernels
    final: jax.Array  # [batch, Q, heads, *grid, channels or 1]: total signed weight of each value


def struct_attention_maps(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_kernels: jax.Array | None = None,
    value_kernels: jax.Array | None = None,
    *,
    stride: int = 1,
    queries: ArrayLike,
) -> StructAttentionMaps:
    """The maps behind `struct_attention` for the queries at flat, row-major grid positions `queries` [Q].

    `final` merges the windows that cover a position (paper, appendix D, figure 4): applied to the
    values it gives the output. Memory grows with Q · N' · window · channels: choose few queries.
    """
    check_arguments(query, key, value, key_kernels, value_kernels, stride, "volume")
    rows = query.reshape(query.shape[0], -1, *query.shape[-2:])
    queries, positions = jnp.asarray(queries), rows.shape[1]
    if queries.ndim != 1:
        raise ValueError(f"struct_attention_maps: queries {queries.shape} should be [Q]")
    if not isinstance(queries, jax.core.Tracer) and not bool(((queries >= 0) & (queries < positions)).all()):
        raise ValueError(f"struct_attention_maps: queries {queries} should lie from 0 to {positions - 1}")
    return _volume(rows[:, queries], key, value, key_kernels, value_kernels, stride)


def effective_rank(matrices: jax.Array) -> jax.Array:
    """How many directions the rows of matrices [..., rows, columns] use, [...]: the exponential of the
    entropy of their singular values (Roy and Vetterli, 2007).

    Of kappa, with a row for each position, it is one for ConvSA and at most D for StructSA.
    """
    values = jnp.linalg.svd(matrices, compute_uv=False)
    shares = values / jnp.maximum(values.sum(axis=-1, keepdims=True), jnp.finfo(values.dtype).tiny)
    return jnp.exp(-jax.scipy.special.xlogy(shares, shares).sum(axis=-1))


def check_arguments(query, key, value, key_kernels, value_kernels, stride, method) -> None:
    """Raises ValueError, in one line, for arguments that do not make a StructSA."""

    def require(condition, message):
        if not condition:
            raise ValueError(f"struct_attention: {message}")

    require(method in METHODS, f"method {method!r} is not one of {', '.join(METHODS)}")
    require(
        query.ndim in (5, 6),
        f"query {query.shape} is not [batch, *grid, heads, channels] on a 2-D or 3-D grid",
    )
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    require(query.shape == key.shape == value.shape, f"{shapes} should be equal")
    types = query.dtype, key.dtype, value.dtype
    require(len(set(types)) == 1, f"query, key and value have types {', '.join(map(str, types))}; use one")
    require(isinstance(stride, int) and stride >= 1, f"stride {stride} is not a positive integer")
    if key_kernels is None and value_kernels is None:
        require(stride == 1, f"stride {stride} without kernels; plain self-attention has no window to stride")
        return
    require(key_kernels is not None, "value_kernels without key_kernels; give both or neither")
    require(value_kernels is not None, "key_kernels without value_kernels; give both or neither")
    heads, channels = query.shape[-2:]
    for name, kernels in (("key_kernels", key_kernels), ("value_kernels", value_kernels)):
        require(
            kernels.ndim == query.ndim
            and kernels.shape[-3] in (1, heads)
            and kernels.shape[-2] in (1, channels),
            f"{name} {kernels.shape} should be [*window, {heads} or 1, {channels} or 1, D]"
            f" with a window of {query.ndim - 3} axes",
        )
        window = kernels.shape[:-3]
        require(all(k % 2 for k in window), f"{name} has an even window {window}; use odd sides")
    dims = key_kernels.shape[-1], value_kernels.shape[-1]
    require(
        dims[0] == dims[1] >= 1,
        f"key_kernels have D={dims[0]} and value_kernels D={dims[1]}; they should be equal, at least 1",
    )


def convolve_patterns(x: jax.Array, kernels: jax.Array, *, stride: int = 1) -> jax.Array:
    """Keys or values under each of D kernels, which is what attention of the factored form sees.

    Args:
      x: [batch, *grid, heads, channels].
      kernels: [*window, heads or 1, channels or 1, D].
      stride: spatial, as for `struct_attention`.

    Returns:
      [batch, D, *grid', heads, channels].
    """
    kernels = _per_channel(kernels, *x.shape[-2:])
    out = depthwise_conv(x.reshape(*x.shape[:-2], -1), kernels, stride=stride)
    return out.reshape(*out.shape[:-1], *x.shape[-2:])


def _per_channel(kernels, heads, channels):
    """[*window, heads or 1, channels or 1, D] -> [*window, heads·channels, D]."""
    kernels = jnp.broadcast_to(kernels, (*kernels.shape[:-3], heads, channels, kernels.shape[-1]))
    return kernels.reshape(*kernels.shape[:-3], heads * channels, -1)


def _attend(query, key, value, method):
    """Attention of query over key and value, all [batch, ..., heads, channels]."""
    flat = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
    with jax.named_scope("attend"):
        return attention(*flat, method=method).reshape(query.shape)


# The factored form, for arrays [batch, *grid, heads·channels] and kernels [*window, heads·channels, D]. Keys
# and values under all kernels, which take D times the room of those that go in, are made again for the
# backward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _factored(query, key, value, key_kernels, value_kernels, heads, stride, method, where):
    args = query, key, value, key_kernels, value_kernels
    return _factored_fwd(*args, heads, stride, method, where)[0]


def _factored_fwd(query, key, value, key_kernels, value_kernels, heads, stride, method, where):
    keys, values = _patterns(key, value, key_kernels, value_kernels, stride)
    with jax.named_scope("attend"):
        output, lse = attention_and_lse(_rows(query), keys, values, heads, method, where)
    kept = (query, key, value, key_kernels, value_kernels, output, lse)
    return output.reshape(query.shape), kept


def _factored_bwd(heads, stride, method, where, kept, cotangent):
    # not before the cotangent is there, nor shared with the forward pass
    (query, key, value, key_kernels, value_kernels, output, lse), cotangent = lax.optimization_barrier(
        (kept, cotangent)
    )
    patterns = functools.partial(_patterns, stride=stride)
    (keys, values), pull = jax.vjp(patterns, key, value, key_kernels, value_kernels)
    with jax.named_scope("attend"):
        d_query, d_keys, d_values = attention_gradients(
            _rows(query), keys, values, output, _rows(cotangent), lse, heads, method, where
        )
    return d_query.reshape(query.shape), *pull((d_keys, d_values))


_factored.defvjp(_factored_fwd, _factored_bwd)


@jax.named_scope("patterns")
def _patterns(key, value, key_kernels, value_kernels, stride):
    """Keys and values under all kernels, [batch, D·N', heads·channels]."""
    pairs = (key, key_kernels), (value, value_kernels)
    return tuple(_rows(depthwise_conv(x, kernels, stride=stride)) for x, kernels in pairs)


def _rows(x):
    """[batch, ..., width] -> [batch, N, width]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _volume(queries, key, value, key_kernels, value_kernels, stride) -> StructAttentionMaps:
    """The definition, for queries [batch, Q, heads, channels]; see the module's docstring."""
    grid, (heads, channels) = key.shape[1:-2], key.shape[-2:]
    if key_kernels is None:  # plain self-attention: one pattern, the window of one, weight one
        key_kernels = value_kernels = jnp.ones((*[1] * len(grid), 1, 1, 1), key.dtype)
    key_kernels, value_kernels = key_kernels.astype(key.dtype), value_kernels.astype(value.dtype)
    with jax.default_matmul_precision("highest"):
        logits = jnp.stack(
            [
                _correlate(queries[:, :, h], key[..., h, :], _of_head(key_kernels, h), stride)
                for h in range(heads)
            ],
            axis=2,
        )  # [batch, Q, heads, D, *grid']
        accumulate = jnp.promote_types(logits.dtype, jnp.float32)
        positions = tuple(range(3, logits.ndim))
        attention = jax.nn.softmax(logits.astype(accumulate) * channels**-0.5, axis=positions)
        attention = attention.astype(value.dtype)

        window, grid_out = value_kernels.shape[:-3], attention.shape[4:]
        flat = attention.reshape(*attention.shape[:4], -1)
        taps = jnp.broadcast_to(value_kernels, (*window, heads, *value_kernels.shape[-2:]))
        taps = taps.reshape(-1, *taps.shape[-3:])  # [window, heads, channels or 1, D]
        kappa = jnp.einsum("bqhdj,mhcd->bqhjmc", flat, taps)

        columns = _windows(value, window, stride)  # [batch, grid', window, heads, channels]
        output = jnp.sum(kappa * jnp.moveaxis(columns, 3, 1)[:, None], axis=(3, 4))
        final = _merge_windows(kappa, window, grid, stride)
    kappa = kappa.reshape(*kappa.shape[:3], *grid_out, *window, kappa.shape[-1])
    return StructAttentionMaps(output, attention, kappa, final)


def _of_head(kernels, head):
    return kernels[..., min(head, kernels.shape[-3] - 1), :, :]


def _correlate(queries, key, kernels, stride):
    """Convolves the correlation volume of one head: queries [batch, Q, C], key [batch, *grid, C],
    kernels [*window, C or 1, D] -> [batch, Q, D, *grid'].

    The volume is q_i K^T with shared kernels (eq. 2) and diag(q_i) K^T with kernels per channel.
    """
    (batch, count), grid = queries.shape[:2], key.shape[1:-1]
    volume = queries.reshape(batch, count, *[1] * len(grid), -1) * key[:, None]
    if kernels.shape[-2] == 1:
        volume = volume.sum(axis=-1, keepdims=True)
    axes = "THW"[-len(grid) :]
    out = lax.conv_general_dilated(
        volume.reshape(batch * count, *volume.shape[2:]),
        kernels,
        grid_strides(grid, stride),
        same_padding(kernels.shape[:-2]),
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"NC{axes}"),
    )
    return out.reshape(batch, count, *out.shape[1:])


def _windows(x, window, stride):
    """Cuts x [batch, *grid, heads, channels] into windows: [batch, N', M, heads, channels]."""
    cuts = _window_slices(window, x.shape[1:-2], stride)
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0), (0, 0)])
    return jnp.stack([x[:, *cut].reshape(x.shape[0], -1, *x.shape[-2:]) for cut in cuts], axis=2)


def _merge_windows(kappa, window, grid, stride):
    """Adds up what all windows give to a position, the transpose of `_windows`:
    kappa [batch, Q, heads, N', M, C] -> [batch, Q, heads, *grid, C]."""
    padding = same_padding(window)
    padded = [n + low + high for n, (low, high) in zip(grid, padding, strict=True)]
    merged = jnp.zeros((*kappa.shape[:3], *padded, kappa.shape[-1]), kappa.dtype)
    for m, cut in enumerate(_window_slices(window, grid, stride)):
        index = (..., *cut, slice(None))
        merged = merged.at[index].add(kappa[..., m, :].reshape(merged[index].shape))
    return merged[..., *(slice(low, low + n) for n, (low, _) in zip(grid, padding, strict=True)), :]


def _window_slices(window, grid, stride):
    """For each place in the window, what it sees of the padded grid from all window centres."""
    strides = grid_strides(grid, stride)
    return [
        tuple(slice(o, o + n, s) for o, n, s in zip(offset, grid, strides, strict=True))
        for offset in itertools.product(*map(range, window))
    ]
