"""Select the layer, head and query whose attention has the most structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import entr

from structvit_jax.analysis.explain.maps import Layer, position_of
from structvit_jax.models import StructAttention

_MAX_QUERIES = 6  # per layer; candidates are the most textured positions of the middle frame
_MIN_SIDE = 3  # a candidate layer has at least this many positions along height and width
SCORE = (
    "(effective rank - 1) / (D - 1), or 1 if D < 2, times 4 h (1 - h) with h = entropy of the attention /"
    " log(D x number of keys)"
)


class Choice(NamedTuple):
    """The selected layer, head and query."""

    layer: str
    head: int
    point: tuple[float, ...]  # the query, in fractions of the input's sides
    score: float = 0.0  # from 0 to 1; see `scores`


def choose(
    layers: Mapping[str, Layer],
    pixels: np.ndarray,
    *,
    layer: str | None = None,
    head: int | None = None,
    point: tuple[float, ...] | None = None,
) -> Choice:
    """Return the candidate with the highest score.

    Candidates are all heads of the layers whose frames have at least 3 x 3 positions (of all layers if there
    is no such layer). In each layer, candidate queries are up to 6 of the most textured positions of the
    middle frame. Of equal scores, the last layer wins, then the first head, then the most textured position.

    Args:
      layers: the layers of a network, by name.
      pixels: uint8 [[time,] height, width, 3], as the model sees them.
      layer, head, point: if not None, use only this layer, head or query.
    """
    large = [name for name, one in layers.items() if min(one.grid[-2:]) >= _MIN_SIDE] or list(layers)
    candidates = []
    for name in [layer] if layer else reversed(large):
        points = [point] if point else textured(pixels, layers[name].grid, _MAX_QUERIES)
        found = scores(layers[name], [position_of(layers[name], one) for one in points])
        found = found.round(4)  # floating-point errors should not break ties
        if head is not None:
            found = found[min(head, len(found) - 1)][None]  # an unknown head is an error in query_maps
        row, column = np.unravel_index(int(found.argmax()), found.shape)
        number = int(row) if head is None else head
        candidates.append(Choice(name, number, points[column], float(found[row, column])))
    return max(candidates, key=lambda choice: choice.score)


def textured(pixels: np.ndarray, grid: Sequence[int], count: int) -> list[tuple[float, ...]]:
    """Return the centres of the grid cells with the highest variance in the middle frame, highest first.

    Cells with less than half of the highest variance are left out.

    Args:
      pixels: [[time,] height, width, 3].
      grid: ([time,] height, width).
      count: maximum number of cells.

    Returns:
      Points, in fractions of the input's sides.
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


def scores(layer: Layer, positions: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the score of each head and query, as defined by `SCORE`: float64 [heads, queries], from 0 to 1.

    The first factor is high if the dynamic kernels differ between positions. The second factor is high if the
    attention is neither uniform nor at a single key.
    """
    flat = jnp.array([np.ravel_multi_index(position, layer.grid) for position in positions])
    attention = np.asarray(_attention(layer.attention, layer.x, flat), np.float64)
    attention = np.moveaxis(attention.reshape(*attention.shape[:3], -1), 1, 0)  # [heads, queries, D, keys]
    h = np.zeros(attention.shape[:2])
    if (keys := attention.shape[-2] * attention.shape[-1]) > 1:
        h = np.clip(entr(attention).sum(axis=(-2, -1)) / math.log(keys), 0, 1)
    dim = layer.structure_dim
    rank = (effective_ranks(layer, attention) - 1) / (dim - 1) if dim > 1 else 1
    return rank * 4 * h * (1 - h)


def effective_ranks(layer: Layer, attention: np.ndarray) -> np.ndarray:
    """Return effective ranks [heads, queries] of the dynamic kernels of attention [heads, queries, D, keys].

    The dynamic kernels are the matrix product V A of the value kernels V and the attention A. With the QR
    decomposition V = Q R, where Q is orthonormal, V A has the same singular values as the much smaller R A.
    """
    kernels = layer.kernels()[1].astype(np.float64)
    rows = np.moveaxis(kernels, -3, 0).reshape(kernels.shape[-3], -1, kernels.shape[-1])
    factor = np.asarray(np.linalg.qr(rows, mode="r"))  # [heads or 1, at most D, D]
    singular = np.linalg.svd(factor[:, None] @ attention, compute_uv=False)
    total = np.maximum(singular.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.exp(entr(singular / total).sum(axis=-1))


@nnx.jit  # layers of the same shape share one compiled program
def _attention(attention: StructAttention, x: jax.Array, queries: jax.Array) -> jax.Array:
    """Return the attention [queries, heads, D, *key_grid]."""
    return attention.maps(x, queries).attention[0]
