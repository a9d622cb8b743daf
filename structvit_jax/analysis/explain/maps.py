"""Compute the inputs of the attention layers of a network, and the maps of single queries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structvit_jax.models import Network, StructAttention
from structvit_jax.ops import StructAttentionMaps, effective_rank
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """An attention layer of a network, and its input."""

    name: str  # of its block, such as "blocks3.0"
    attention: StructAttention
    x: jax.Array  # [1, *grid, width], after the block's norm

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of positions along (time, height, width) or (height, width)."""
        return self.x.shape[1:-1]

    @property
    def key_grid(self) -> tuple[int, ...]:
        """The number of key and value positions along each axis; a stride reduces it."""
        return self.attention.key_grid(self.grid)

    @property
    def structure_dim(self) -> int:
        """D, the number of structure kernels; 1 for plain self-attention."""
        kernels = self.attention.key_kernels
        return 1 if kernels is None else kernels.shape[-1]

    @property
    def kind(self) -> str:
        """The paper's name for this type of attention."""
        if self.attention.key_kernels is None:
            return "self-attention"
        return "ConvSA" if self.structure_dim == 1 else f"StructSA, D = {self.structure_dim}"

    def kernels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return key and value kernels [*window, heads or 1, channels or 1, D]; ones for self-attention."""
        attention = self.attention
        if attention.key_kernels is None or attention.value_kernels is None:
            ones = np.ones((*[1] * len(self.grid), attention.heads, 1, 1), np.float32)
            return ones, ones
        return np.asarray(attention.key_kernels[...]), np.asarray(attention.value_kernels[...])

    @functools.cached_property
    def maps(self) -> Callable[[jax.Array], tuple[jax.Array, StructAttentionMaps]]:
        """A compiled function that takes queries, given as flat positions [Q].

        It returns the correlations of the queries with all keys [Q, heads, *grid], scaled like logits, and
        the maps of all heads.
        """

        def run(queries: jax.Array) -> tuple[jax.Array, StructAttentionMaps]:
            query, key, *_ = self.attention.operands(self.x)
            rows = query.reshape(-1, *query.shape[-2:])[queries] * query.shape[-1] ** -0.5
            correlations = jnp.einsum("qhc,...hc->qh...", rows, key[0], precision="highest")
            return correlations, self.attention.maps(self.x, queries)

        return jax.jit(run)

    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values, each [*grid, heads, channels]."""
        query, key, value, *_ = self.attention.operands(self.x)
        return query[0], key[0], value[0]


def layers(network: Network, x: jax.Array) -> dict[str, Layer]:
    """Return all attention layers by name, in order.

    Args:
      network: in evaluation mode.
      x: one normalised input, [1, [time,] height, width, 3].
    """
    network = nnx.clone(network)
    network.variant = dataclasses.replace(network.variant, remat="none")
    # A DeiT has `blocks`; a hierarchical network has `blocks1` to `blocks4`.
    lists = ("blocks", "blocks1", "blocks2", "blocks3", "blocks4")
    stages = [name for name in lists if hasattr(network, name)]
    blocks = {f"{stage}.{i}": block for stage in stages for i, block in enumerate(getattr(network, stage))}
    activations: list[jax.Array] = []

    def record(name: str, array: jax.Array) -> jax.Array:
        activations.append(array)
        return array

    def run(x: jax.Array) -> list[jax.Array]:
        activations.clear()
        network.features(x, hook=record)
        inputs, start = [], 0
        for stage in stages:  # a stage records its embedding, then the output of each block
            end = start + len(getattr(network, stage))
            inputs += activations[start:end]
            start = end + 1
        return [
            block.norm1(block.add_position(array))
            for block, array in zip(blocks.values(), inputs, strict=True)
        ]

    return {
        name: Layer(name, block.attn, array)
        for (name, block), array in zip(blocks.items(), jax.jit(run)(x), strict=True)
        if isinstance(block.attn, StructAttention)
    }


class Query(NamedTuple):
    """The maps of one query in one head of a layer. `grid` and `key_grid` are those of the layer."""

    position: tuple[int, ...]  # on the grid
    head: int
    correlation: np.ndarray  # [*grid]: dot products with all keys, without kernels; scaled like logits
    attention: np.ndarray  # [D, *key_grid]: sums to one over all axes
    kappa: np.ndarray  # [*key_grid, *window, channels or 1]: the dynamic kernels (paper, equation 5)
    final: np.ndarray  # [*grid, channels or 1]: total signed weight of each value (appendix D)
    rank: float  # effective rank of the dynamic kernels of all key positions, from 1 to D


def query_maps(layer: Layer, head: int, position: Sequence[int]) -> Query:
    """Return the maps of one query and head; see `structvit_jax.ops.struct_attention_maps`.

    Raises:
      UserError: the layer does not have this head or position.
    """
    heads, position = layer.attention.heads, tuple(position)
    if not 0 <= head < heads:
        raise UserError(f"{layer.name} has heads 0 to {heads - 1}, not {head}")
    fits = len(position) == len(layer.grid)
    if not fits or not all(0 <= at < n for at, n in zip(position, layer.grid, strict=True)):
        raise UserError(f"position {position} is not on the grid {layer.grid} of {layer.name}")
    correlations, maps = layer.maps(jnp.array([np.ravel_multi_index(position, layer.grid)]))
    kappa = maps.kappa[0, 0, head]
    return Query(
        position,
        head,
        np.asarray(correlations[0, head]),
        np.asarray(maps.attention[0, 0, head]),
        np.asarray(kappa),
        np.asarray(maps.final[0, 0, head]),
        float(effective_rank(kappa.reshape(math.prod(layer.key_grid), -1))),
    )


def position_of(layer: Layer, point: Sequence[float]) -> tuple[int, ...]:
    """Return the grid position at a point of the input, given in fractions of its sides."""
    return tuple(min(int(at * n), n - 1) for at, n in zip(point, layer.grid, strict=True))
