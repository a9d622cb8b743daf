"""StructSA: attention that reads the structure of query-key correlations.

Kim, Seo, Schmid, Cho, "Learning Correlation Structures for Vision Transformers", CVPR 2024.

Let q_i be a query, and K_j and V_j the keys and values in the window centred on position j, which are zero
outside the grid. There are D kernels, and one softmax over all positions j and kernels d together:

    a_ijd      = softmax_(j,d)  sum_c q_ic sum_m H_K[m,c,d] K_jmc / sqrt(channels)   (eq. 2-3, app. A)
    kappa_ijmc = sum_d H_V[m,c,d] a_ijd                                     the dynamic kernel (eq. 5)
    y_ic       = sum_j sum_m kappa_ijmc V_jmc

Special cases:

- kernels with one value for all channels (U_K, U_V): the paper's dot-product correlation (keys) and shared
  aggregation (values);
- a value window of one: element aggregation (eq. 4);
- D = 1: ConvSA, self-attention with convolutional projections as in CvT;
- no kernels: plain self-attention.

The sums over the window m can be computed before the dot product with the query and before the sum over j.
They are then depthwise convolutions of keys and values, with D kernels per channel, and the rest is ordinary
attention over N'·D keys, for N' window centres. `struct_attention` computes this. `struct_attention_maps`
computes the equations as they are written, with the correlation volume and the dynamic kernels in memory; the
tests use it as the reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from structvit_jax.ops.attention import attention
from structvit_jax.ops.convolution import depthwise_conv, grid_strides, same_padding
from structvit_jax.ops.dispatch import operation, require


def check_arguments(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_kernels: jax.Array | None,
    value_kernels: jax.Array | None,
    *,
    stride: int | float,
) -> None:
    """Raise ValueError, with a message of one line, for invalid arguments of `struct_attention`."""
    name = "struct_attention"
    grid = query.ndim in (5, 6)
    require(grid, f"{name}: query {query.shape} is not [batch, *grid, heads, channels] on a 2-D or 3-D grid")
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    require(query.shape == key.shape == value.shape, f"{name}: {shapes} should be equal")
    types = [str(x.dtype) for x in (query, key, value)]
    require(len(set(types)) == 1, f"{name}: query, key and value have types {', '.join(types)}; use one")
    require(isinstance(stride, int) and stride >= 1, f"{name}: stride {stride} is not a positive integer")
    if key_kernels is None or value_kernels is None:
        given = "key" if value_kernels is None else "value"
        require(key_kernels is value_kernels, f"{name}: {given}_kernels alone; give both or neither")
        require(stride == 1, f"{name}: stride {stride} without kernels; plain self-attention has no window")
        return
    heads, channels = query.shape[-2:]
    for kind, kernels in (("key", key_kernels), ("value", value_kernels)):
        shape, window = kernels.shape, kernels.shape[:-3]
        require(
            kernels.ndim == query.ndim and shape[-3] in (1, heads) and shape[-2] in (1, channels),
            f"{name}: {kind}_kernels {shape} should be [*window, {heads} or 1, {channels} or 1, D]"
            f" and the window should have {query.ndim - 3} axes",
        )
        odd = all(k % 2 for k in window)
        require(odd, f"{name}: {kind}_kernels has an even window {window}; use odd sides")
    dims = key_kernels.shape[-1], value_kernels.shape[-1]
    values = f"key_kernels have D={dims[0]} and value_kernels D={dims[1]}"
    require(dims[0] == dims[1] >= 1, f"{name}: {values}; they should be equal, at least 1")


@operation(check=check_arguments)
def struct_attention(
    query: Float[Array, "b *grid h c"],
    key: Float[Array, "b *grid h c"],
    value: Float[Array, "b *grid h c"],
    key_kernels: Float[Array, "*_ d"] | None = None,
    value_kernels: Float[Array, "*_ d"] | None = None,
    *,
    stride: int = 1,
) -> Float[Array, "b *grid h c"]:
    """Structural self-attention over a grid.

    Args:
      query, key, value: [batch, *grid, heads, channels]. The grid is (height, width) or (time, height,
        width).
      key_kernels, value_kernels: [*window, heads or 1, channels or 1, D]. Axes of size 1 are broadcast.
        Window sides are odd; the two windows may differ. Give both kernels, or neither for plain
        self-attention.
      stride: spatial stride S. Window centres lie at 0, S, 2S, ...: ceil(n / S) of them along an axis of
        length n.

    Returns:
      [batch, *grid, heads, channels].

    Raises:
      ValueError: shapes do not match, only one of the kernels is given, the kernels differ in D, a window
        side is even, or a stride is given without kernels.
    """
    if key_kernels is not None and value_kernels is not None:
        with jax.named_scope("patterns"):
            key = convolve_structure(key, key_kernels, stride=stride)
            value = convolve_structure(value, value_kernels, stride=stride)
    with jax.named_scope("attend"):
        output = attention(*(x.reshape(len(x), -1, *x.shape[-2:]) for x in (query, key, value)))
    return output.reshape(query.shape)


def convolve_structure(
    x: Float[Array, "b *grid h c"], kernels: Float[Array, "*_ d"], *, stride: int = 1
) -> Float[Array, "b d *_ h c"]:
    """Convolve keys or values with each of the D structure kernels.

    Args:
      x: [batch, *grid, heads, channels].
      kernels: [*window, heads or 1, channels or 1, D].
      stride: spatial stride, see `struct_attention`.

    Returns:
      [batch, D, *grid', heads, channels], where grid' is the grid of the window centres.
    """
    out = depthwise_conv(x.reshape(*x.shape[:-2], -1), per_channel(kernels, *x.shape[-2:]), stride=stride)
    return out.reshape(*out.shape[:-1], *x.shape[-2:])


def per_channel(kernels: jax.Array, heads: int, channels: int) -> jax.Array:
    """Expand structure kernels to the kernels of a depthwise convolution, [*window, heads·channels, D]."""
    kernels = jnp.broadcast_to(kernels, (*kernels.shape[:-3], heads, channels, kernels.shape[-1]))
    return kernels.reshape(*kernels.shape[:-3], heads * channels, -1)


class StructAttentionMaps(NamedTuple):
    """Attention and dynamic kernels of Q selected queries.

    `channels or 1` is 1 if the value kernels are shared by all channels.
    """

    output: jax.Array  # [batch, Q, heads, channels]
    attention: jax.Array  # [batch, Q, heads, D, *grid']: sums to one over D and grid' together
    kappa: jax.Array  # [batch, Q, heads, *grid', *window, channels or 1]: the dynamic kernels
    final: jax.Array  # [batch, Q, heads, *grid, channels or 1]: total weight of each value, may be negative


def struct_attention_maps(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_kernels: ArrayLike | None = None,
    value_kernels: ArrayLike | None = None,
    *,
    stride: int = 1,
    queries: ArrayLike | Sequence[int],
) -> StructAttentionMaps:
    """Return the attention maps and dynamic kernels of `struct_attention` for selected queries.

    `final` sums the dynamic kernels of all windows that cover a position (paper, appendix D, figure 4). The
    output is the sum of the values, weighted by `final`. Select few queries: memory grows with
    Q · N' · window · channels.

    Args:
      query, key, value, key_kernels, value_kernels, stride: see `struct_attention`.
      queries: flat (row-major) grid positions of the selected queries, [Q].

    Raises:
      ValueError: see `struct_attention`; also if `queries` are not positions of the grid.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    key_kernels, value_kernels = (
        None if x is None else jnp.asarray(x, key.dtype) for x in (key_kernels, value_kernels)
    )
    check_arguments(query, key, value, key_kernels, value_kernels, stride=stride)
    queries, grid, (heads, channels) = jnp.asarray(queries), key.shape[1:-2], key.shape[-2:]
    require(queries.ndim == 1, f"struct_attention_maps: queries {queries.shape} should be [Q]")
    if not isinstance(queries, jax.core.Tracer):
        inside = bool(((queries >= 0) & (queries < math.prod(grid))).all())
        limit = f"should lie from 0 to {math.prod(grid) - 1}"
        require(inside, f"struct_attention_maps: queries {queries} {limit}")
    if key_kernels is None or value_kernels is None:  # plain self-attention: D = 1, one tap of weight one
        key_kernels = value_kernels = jnp.ones((*[1] * len(grid), 1, 1, 1), key.dtype)
    key_taps, value_taps = (  # [*window, heads, channels or 1, D]
        jnp.broadcast_to(x, (*x.shape[:-3], heads, *x.shape[-2:])) for x in (key_kernels, value_kernels)
    )
    rows, window = query.reshape(len(query), -1, heads, channels)[:, queries], value_taps.shape[:-3]
    with jax.default_matmul_precision("highest"):
        per_head = [
            _correlate(rows[:, :, h], key[..., h, :], key_taps[..., h, :, :], stride) for h in range(heads)
        ]
        logits = jnp.stack(per_head, axis=2)  # [batch, Q, heads, D, *grid']
        exact = jnp.promote_types(logits.dtype, jnp.float32)
        positions = tuple(range(3, logits.ndim))
        weights = jax.nn.softmax(logits.astype(exact) * channels**-0.5, axis=positions).astype(value.dtype)

        flat_taps = value_taps.reshape(-1, *value_taps.shape[-3:])
        flat_weights = weights.reshape(*weights.shape[:4], -1)
        kappa = jnp.einsum("bqhdj,mhcd->bqhjmc", flat_weights, flat_taps)
        windows = _windows(value, window, stride)  # [batch, grid', window, heads, channels]
        output = jnp.sum(kappa * jnp.moveaxis(windows, 3, 1)[:, None], axis=(3, 4))
        final = _merge_windows(kappa, window, grid, stride)
    kappa = kappa.reshape(*kappa.shape[:3], *weights.shape[4:], *window, kappa.shape[-1])
    return StructAttentionMaps(output, weights, kappa, final)


def _correlate(queries: jax.Array, key: jax.Array, kernels: jax.Array, stride: int) -> jax.Array:
    """Convolve the correlation volume of one head.

    The volume is q_i K^T for kernels shared by all channels (eq. 2), and diag(q_i) K^T otherwise.

    queries [batch, Q, C], key [batch, *grid, C], kernels [*window, C or 1, D] -> [batch, Q, D, *grid'].
    """
    (batch, count), grid = queries.shape[:2], key.shape[1:-1]
    if kernels.shape[-2] == 1:
        # Use one einsum, not a sum over elementwise products: XLA for CPUs (jax 0.10.2) miscompiles such a
        # sum followed by a convolution.
        volume = jnp.einsum("bqc,b...c->bq...", queries, key)[..., None]
    else:
        volume = queries.reshape(batch, count, *[1] * len(grid), -1) * key[:, None]
    axes = "THW"[-len(grid) :]
    out = lax.conv_general_dilated(
        volume.reshape(batch * count, *volume.shape[2:]),
        kernels,
        grid_strides(grid, stride),
        same_padding(kernels.shape[:-2]),
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"NC{axes}"),  # puts D before the grid
    )
    return out.reshape(batch, count, *out.shape[1:])


def _windows(x: jax.Array, window: Sequence[int], stride: int) -> jax.Array:
    """Cut x [batch, *grid, heads, channels] into windows: [batch, N', M, heads, channels]."""
    cuts = _window_slices(window, x.shape[1:-2], stride)
    x = jnp.pad(x, [(0, 0), *same_padding(window), (0, 0), (0, 0)])
    return jnp.stack([x[:, *cut].reshape(x.shape[0], -1, *x.shape[-2:]) for cut in cuts], axis=2)


def _merge_windows(kappa: jax.Array, window: Sequence[int], grid: Sequence[int], stride: int) -> jax.Array:
    """Add up the weights of all windows that cover a position; the transpose of `_windows`.

    kappa [batch, Q, heads, N', M, C] -> [batch, Q, heads, *grid, C].
    """
    padding = same_padding(window)
    padded = [n + low + high for n, (low, high) in zip(grid, padding, strict=True)]
    merged = jnp.zeros((*kappa.shape[:3], *padded, kappa.shape[-1]), kappa.dtype)
    for m, cut in enumerate(_window_slices(window, grid, stride)):
        index = (..., *cut, slice(None))
        merged = merged.at[index].add(kappa[..., m, :].reshape(merged[index].shape))
    return merged[..., *(slice(low, low + n) for n, (low, _) in zip(grid, padding, strict=True)), :]


def _window_slices(window: Sequence[int], grid: Sequence[int], stride: int) -> list[tuple[slice, ...]]:
    """Return, per offset within the window, the slices of the padded grid that the windows read there."""
    strides = grid_strides(grid, stride)
    return [
        tuple(slice(o, o + n, s) for o, n, s in zip(offset, grid, strides, strict=True))
        for offset in itertools.product(*map(range, window))
    ]


def effective_rank(matrices: Float[Array, "*batch r c"]) -> Float[Array, " *batch"]:
    """Return the effective rank of matrices [..., rows, columns]: [...].

    This is the exponential of the entropy of their normalised singular values (Roy and Vetterli, 2007). For a
    matrix whose rows are the dynamic kernels (kappa) of all positions, it is one for ConvSA and at most D for
    StructSA.
    """
    values = jnp.linalg.svd(matrices, compute_uv=False)
    fractions = values / jnp.maximum(values.sum(axis=-1, keepdims=True), jnp.finfo(values.dtype).tiny)
    return jnp.exp(-jax.scipy.special.xlogy(fractions, fractions).sum(axis=-1))
