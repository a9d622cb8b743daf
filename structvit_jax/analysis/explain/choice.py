"""Select the layer, head and query whose attention has the most structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import xlogy

from structvit_jax.analysis.explain.maps import Layer, position_of, textured
from structvit_jax.models import StructAttention

_QUERIES = 6  # candidates of a layer: the most textured positions of the middle frame
_MIN_SIDE = 3  # positions along height and width of a candidate layer
SCORE = (
    "(effective rank - 1) / (D - 1), or 1 if D < 2, times 4 h (1 - h) with h = entropy of the attention /"
    " log(D keys)"
)


class Choice(NamedTuple):
    """A query of a head of a layer."""

    layer: str
    head: int
    point: tuple[float, ...]  # the query, in fractions of the input's sides
    score: float = 0.0  # of `scores`, from 0 to 1


def choose(
    layers: Mapping[str, Layer],
    pixels: np.ndarray,
    *,
    layer: str | None = None,
    head: int | None = None,
    point: tuple[float, ...] | None = None,
) -> Choice:
    """Return the candidate with the highest score.

    Candidates are the layers whose frames have at least 3 x 3 positions (all layers if none has), their
    heads, and up to 6 of the most textured positions of the middle frame. Of equal scores, the last layer
    wins, then the first head and the most textured position.

    Args:
      layers: of a network, by name.
      pixels: uint8 [[time,] height, width, 3], as the model sees them.
      layer, head, point: if given, the only candidate.
    """
    large = [name for name, one in layers.items() if min(one.grid[-2:]) >= _MIN_SIDE] or list(layers)
    candidates = []
    for name in [layer] if layer else reversed(large):
        points = [point] if point else textured(pixels, layers[name].grid, _QUERIES)
        found = scores(layers[name], [position_of(layers[name], one) for one in points])
        found = found.round(4)  # so that rounding errors do not decide
        if head is not None:
            found = found[min(head, len(found) - 1)][None]  # query_maps reports an unknown head
        row, column = np.unravel_index(int(found.argmax()), found.shape)
        number = int(row) if head is None else head
        candidates.append(Choice(name, number, points[column], float(found[row, column])))
    return max(candidates, key=lambda choice: choice.score)


def scores(layer: Layer, positions: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return how much structure the attention of queries has: float64 [heads, queries], from 0 to 1.

    The first factor of `SCORE` is high if the dynamic kernels differ between positions. The second is high if
    attention selects: h, its entropy over the largest possible, is 1 for uniform attention and 0 for
    attention at a single key, and the factor is 0 for both.
    """
    flat = jnp.array([np.ravel_multi_index(position, layer.grid) for position in positions])
    attention = np.asarray(_attention(layer.attention, layer.x, flat), np.float64)
    attention = np.moveaxis(attention.reshape(*attention.shape[:3], -1), 1, 0)  # [heads, queries, D, keys]
    h = np.zeros(attention.shape[:2])
    if (keys := attention.shape[-2] * attention.shape[-1]) > 1:
        h = np.clip(_entropy(attention.reshape(*h.shape, keys)) / math.log(keys), 0, 1)
    dim = layer.structure_dim
    rank = (effective_ranks(layer, attention) - 1) / (dim - 1) if dim > 1 else 1
    return rank * 4 * h * (1 - h)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy along the last axis; 0 log 0 is 0."""
    return -xlogy(probabilities, probabilities).sum(axis=-1)


def effective_ranks(layer: Layer, attention: np.ndarray) -> np.ndarray:
    """Return effective ranks [heads, queries] of the dynamic kernels of attention [heads, queries, D, keys].

    Dynamic kernels are products of attention and value kernels; their singular values follow from the D x D
    Gram matrices of the two factors, without the products themselves.
    """
    kernels = layer.kernels()[1].astype(np.float64)
    rows = np.moveaxis(kernels, -3, 0).reshape(kernels.shape[-3], -1, kernels.shape[-1])
    values, vectors = np.linalg.eigh(np.swapaxes(rows, -1, -2) @ rows)  # [heads or 1, D, D]
    root = (vectors * np.sqrt(np.clip(values, 0, None))[:, None]) @ np.swapaxes(vectors, -1, -2)
    gram = attention @ np.swapaxes(attention, -1, -2)
    squares = np.linalg.eigvalsh(root[:, None] @ gram @ root[:, None])
    singular = np.sqrt(np.clip(squares, 0, None))
    total = np.maximum(singular.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.exp(_entropy(singular / total))


@nnx.jit  # compiled once for layers of the same shape; computes no other maps
def _attention(attention: StructAttention, x: jax.Array, queries: jax.Array) -> jax.Array:
    """Return the attention [queries, heads, D, *key_grid]."""
    return attention.maps(x, queries).attention[0]
