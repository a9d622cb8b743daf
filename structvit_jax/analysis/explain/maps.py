"""The numbers behind the pictures: each attention layer of a network on one input, and what a query sees."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structvit_jax.models import Network, StructAttention
from structvit_jax.ops import StructAttentionMaps, effective_rank
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """An attention layer of a network, and what one input makes of it."""

    name: str  # of its block, as "blocks3.0"
    attention: StructAttention
    x: jax.Array  # [1, *grid, width]: what goes into it, normalised

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions along (time, height, width), or (height, width)."""
        return self.x.shape[1:-1]

    @property
    def key_grid(self) -> tuple[int, ...]:
        """Positions of keys and values: fewer with a stride."""
        return self.attention.key_grid(self.grid)

    @property
    def patterns(self) -> int:
        """D; one for plain self-attention, whose one pattern is a single correlation."""
        kernels = self.attention.key_kernels
        return 1 if kernels is None else kernels.shape[-1]

    @property
    def kind(self) -> str:
        """What the paper calls it."""
        if self.attention.key_kernels is None:
            return "self-attention"
        return "ConvSA" if self.patterns == 1 else f"StructSA, D = {self.patterns}"

    def kernels(self) -> tuple[np.ndarray, np.ndarray]:
        """Of keys and values, [*window, heads or 1, channels or 1, D]; a one where it has none."""
        attention = self.attention
        if attention.key_kernels is None or attention.value_kernels is None:
            ones = np.ones((*[1] * len(self.grid), attention.heads, 1, 1), np.float32)
            return ones, ones
        return np.asarray(attention.key_kernels[...]), np.asarray(attention.value_kernels[...])

    @functools.cached_property
    def maps(self) -> Callable[[jax.Array], tuple[jax.Array, StructAttentionMaps]]:
        """Of the queries at flat positions [Q]: their correlations with all keys [Q, heads, *grid], scaled as
        logits are, and the maps of all heads. Compiled once."""

        def run(queries):
            query, key, *_ = self.attention.operands(self.x)
            rows = query.reshape(-1, *query.shape[-2:])[queries] * query.shape[-1] ** -0.5
            correlations = jnp.einsum("qhc,...hc->qh...", rows, key[0], precision="highest")
            return correlations, self.attention.maps(self.x, queries)

        return jax.jit(run)

    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, [*grid, heads, channels]."""
        query, key, value, *_ = self.attention.operands(self.x)
        return query[0], key[0], value[0]


def layers(network: Network, x: jax.Array) -> dict[str, Layer]:
    """All attention layers, in the order in which they come.

    Args:
      network: in evaluation mode.
      x: one input, normalised: [1, [time,] height, width, 3].
    """
    network = nnx.clone(network)
    network.variant = dataclasses.replace(network.variant, remat="none")
    inputs: list[jax.Array] = []

    def record(name: str, array: jax.Array) -> jax.Array:
        inputs.append(array)
        return array

    def run(x):
        inputs.clear()
        network.features(x, hook=record)
        return [
            block.norm1(block.add_position(array))
            for (_, block), array in zip(_blocks(network), _of_blocks(network, inputs), strict=True)
        ]

    found = zip(_blocks(network), jax.jit(run)(x), strict=True)
    return {
        name: Layer(name, block.attn, array)
        for (name, block), array in found
        if isinstance(block.attn, StructAttention)
    }


def _rows(network: Any) -> list[str]:
    """Names of the lists of blocks."""
    names = ["blocks", *(f"blocks{stage}" for stage in range(1, 5))]
    return [name for name in names if hasattr(network, name)]


def _blocks(network: Any) -> list[tuple[str, Any]]:
    return [(f"{row}.{i}", block) for row in _rows(network) for i, block in enumerate(getattr(network, row))]


def _of_blocks(network: Any, placed: Sequence[jax.Array]) -> Iterator[jax.Array]:
    """Of what a network places, a row's embedding and then each block's output, the inputs of blocks."""
    ends = itertools.accumulate((len(getattr(network, row)) + 1 for row in _rows(network)), initial=0)
    for start, end in itertools.pairwise(ends):
        yield from placed[start : end - 1]


class Query(NamedTuple):
    """What one query sees in one head of a layer. Positions are those of the layer's grids."""

    position: tuple[int, ...]  # on the grid
    correlation: np.ndarray  # [*grid]: with every key, before kernels; scaled as logits are
    attention: np.ndarray  # [D, *key_grid]: sums to one
    kappa: np.ndarray  # [*key_grid, *window, channels or 1]: the dynamic kernels
    final: np.ndarray  # [*grid, channels or 1]: total signed weight of each value
    rank: float  # effective rank of kappa over positions, from 1 to D


def query_maps(layer: Layer, head: int, position: Sequence[int]) -> Query:
    """The maps of `structvit_jax.ops.struct_attention_maps` for one query and head.

    Raises:
      UserError: a head or a position that the layer has not.
    """
    heads, position = layer.attention.heads, tuple(position)
    if not 0 <= head < heads:
        raise UserError(f"{layer.name} has the heads 0 to {heads - 1}, and no {head}")
    fits = len(position) == len(layer.grid)
    if not fits or not all(0 <= at < n for at, n in zip(position, layer.grid, strict=True)):
        raise UserError(f"position {position} does not lie on the grid {layer.grid} of {layer.name}")
    correlations, maps = layer.maps(jnp.array([np.ravel_multi_index(position, layer.grid)]))
    kappa = maps.kappa[0, 0, head]
    rows = kappa.reshape(math.prod(layer.key_grid), -1)
    return Query(
        position,
        np.asarray(correlations[0, head]),
        np.asarray(maps.attention[0, 0, head]),
        np.asarray(kappa),
        np.asarray(maps.final[0, 0, head]),
        float(effective_rank(rows)),
    )


def position_of(layer: Layer, point: Sequence[float]) -> tuple[int, ...]:
    """Where on a layer's grid a point of the input lies, given in shares, from 0 to 1, of its sides."""
    return tuple(min(int(share * n), n - 1) for share, n in zip(point, layer.grid, strict=True))


def textured(pixels: np.ndarray, grid: Sequence[int], count: int = 1) -> list[tuple[float, ...]]:
    """Return the centres of the cells of a grid whose pixels vary most in the middle frame, the most textured
    first, as fractions of the input's sides. Cells with less than half of the largest variance are left out.

    Args:
      pixels: [[time,] height, width, 3].
      grid: ([time,] height, width).
      count: how many cells at most.
    """
    *time, rows, columns = grid
    frame = pixels[len(pixels) // 2] if time else pixels
    grey = frame.astype(np.float32).mean(axis=-1)
    cells = [np.array_split(row, columns, axis=1) for row in np.array_split(grey, rows, axis=0)]
    variance = np.array([[cell.var() for cell in row] for row in cells])
    best = np.argsort(-variance, axis=None, kind="stable")[:count]
    best = best[variance.ravel()[best] >= variance.max() / 2]
    return [
        (*[0.5] * len(time), (float(row) + 0.5) / rows, (float(column) + 0.5) / columns)
        for row, column in zip(*np.unravel_index(best, variance.shape), strict=True)
    ]
