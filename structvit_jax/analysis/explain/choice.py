"""Choose what to show: the layer, head and query whose attention has the most structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structvit_jax.analysis.explain.maps import Layer, position_of, textured
from structvit_jax.models import StructAttention

QUERIES = 6  # candidates of a layer, the most textured positions of the middle frame
_LEAST_SIDE = 3  # positions along the sides of a frame that make a map worth looking at
SCORE = (
    "(effective rank - 1) / (D - 1), or 1 if D < 2, times 4 h (1 - h) with h = entropy of the attention /"
    " log(D keys)"
)


class Choice(NamedTuple):
    """A layer, a head and a query of it."""

    layer: str
    head: int
    point: tuple[float, ...]  # the query, in fractions of the input's sides
    score: float  # by `scores`, from 0 to 1


def choose(
    layers: Mapping[str, Layer],
    pixels: np.ndarray,
    *,
    layer: str | None = None,
    head: int | None = None,
    point: tuple[float, ...] | None = None,
) -> Choice:
    """Return the candidate with the highest score; of equals the last layer, then the first head and the most
    textured position.

    Candidates are the layers whose frames have at least 3 x 3 positions (all layers if none has), their
    heads, and up to `QUERIES` of the most textured positions of the middle frame.

    Args:
      layers: of a network, by name.
      pixels: uint8 [[time,] height, width, 3], as the model sees them.
      layer, head, point: considered alone if given.
    """
    large = [name for name, one in layers.items() if min(one.grid[-2:]) >= _LEAST_SIDE] or list(layers)
    best: Choice | None = None
    for name in [layer] if layer else reversed(large):
        one = layers[name]
        points = [point] if point else textured(pixels, one.grid, QUERIES)
        positions = [position_of(one, candidate) for candidate in points]
        found = scores(one, positions).round(4)  # so that rounding errors do not decide
        if head is not None:
            found = found[min(head, len(found) - 1)][None]
        row, column = np.unravel_index(int(found.argmax()), found.shape)
        score = float(found[row, column])
        if best is None or score > best.score:
            best = Choice(name, int(row) if head is None else head, points[column], score)
    assert best is not None  # a network has an attention layer
    return best


def scores(layer: Layer, positions: list[tuple[int, ...]]) -> np.ndarray:
    """Return how much structure the attention of queries has: float64 [heads, queries], from 0 to 1.

    The score is high if the dynamic kernels differ from place to place, as their effective rank measures, and
    if attention selects: h, its entropy over the largest possible, is 1 where attention is even and 0 where
    it is at one key, and shows nothing at either end.
    """
    flat = jnp.array([np.ravel_multi_index(position, layer.grid) for position in positions])
    attention = np.asarray(_attention(layer.attention, layer.x, flat), np.float64)
    attention = np.moveaxis(attention.reshape(*attention.shape[:3], -1), 1, 0)  # [heads, queries, D, keys]
    keys = attention.shape[-2] * attention.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(attention > 0, attention * np.log(attention), 0)
    h = (
        np.clip(-terms.sum(axis=(-2, -1)) / math.log(keys), 0, 1)
        if keys > 1
        else np.zeros(attention.shape[:2])
    )
    rank = (effective_ranks(layer, attention) - 1) / (layer.patterns - 1) if layer.patterns > 1 else 1
    return rank * 4 * h * (1 - h)


def effective_ranks(layer: Layer, attention: np.ndarray) -> np.ndarray:
    """Return the effective ranks of the dynamic kernels that attention [heads, queries, D, keys] makes.

    They are products of attention and value kernels; their singular values follow from the D x D Gram
    matrices of the two factors, without the products themselves.
    """
    kernels = layer.kernels()[1].astype(np.float64)
    rows = np.moveaxis(kernels, -3, 0).reshape(kernels.shape[-3], -1, kernels.shape[-1])
    values, vectors = np.linalg.eigh(np.swapaxes(rows, -1, -2) @ rows)  # [heads or 1, D, D]
    root = (vectors * np.sqrt(np.clip(values, 0, None))[:, None]) @ np.swapaxes(vectors, -1, -2)
    gram = attention @ np.swapaxes(attention, -1, -2)
    squares = np.linalg.eigvalsh(root[:, None] @ gram @ root[:, None])
    singular = np.sqrt(np.clip(squares, 0, None))
    shares = singular / np.maximum(singular.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(-np.where(shares > 0, shares * np.log(shares), 0).sum(axis=-1))


@nnx.jit  # once for layers of the same shape; what only the other maps need is not computed
def _attention(attention: StructAttention, x: jax.Array, queries: jax.Array) -> jax.Array:
    """[queries, heads, D, *key grid]"""
    return attention.maps(x, queries).attention[0]
