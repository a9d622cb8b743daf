"""Token labelling (LV-ViT's, as UniFormer uses it): a target for every position, and MixToken.

Targets come from a teacher's label maps, of which each crop takes its part; without maps every position has
the label of its image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from structvit_jax.training import losses, mixing

_SAMPLES = 2  # points along each side of a position at which the map is read


def dense_targets(batch: dict[str, jax.Array], grid: tuple[int, int], classes: int) -> jax.Array:
    """Targets of the positions of a batch, float32 [batch, *grid, classes], each summing to one.

    A map's probabilities are read bilinearly where the crop's positions lie in the image, none outside; what
    is missing from one is spread over all classes.

    Args:
      batch: with `map_classes` and `map_scores` [batch, height, width, k], and `pose` [batch, 2, 3], which
        takes a point (x, y, 1) of the crop, both from 0 to 1, to the image's.
      grid: positions along height and width.
      classes: their number.
    """
    scores, chosen = jnp.nan_to_num(batch["map_scores"].astype(jnp.float32)), batch["map_classes"]
    dense = jnp.einsum("bhwk,bhwkc->bhwc", scores, jax.nn.one_hot(chosen, classes))
    ys, xs = ((jnp.arange(n * _SAMPLES) + 0.5) / (n * _SAMPLES) for n in grid)
    points = jnp.stack([*jnp.meshgrid(xs, ys), jnp.ones((len(ys), len(xs)))], axis=-1)
    places = jnp.einsum("bij,yxj->byxi", batch["pose"], points, precision="highest")
    inside = jnp.all((places >= 0) & (places <= 1), axis=-1).astype(jnp.float32)
    rows, columns = (_hats(places[..., axis], dense.shape[2 - axis]) for axis in (1, 0))
    weights = jnp.einsum("byx,byxh,byxw->byxhw", inside, rows, columns)
    weights = weights.reshape(-1, grid[0], _SAMPLES, grid[1], _SAMPLES, *dense.shape[1:3]).mean(axis=(2, 4))
    read = jnp.einsum("byxhw,bhwc->byxc", weights, dense)
    return read + (1 - read.sum(axis=-1, keepdims=True)) / classes


def _hats(places: jax.Array, cells: int) -> jax.Array:
    """Bilinear weights [..., cells] of the cells' centres, for places from 0 to 1."""
    position = jnp.clip(places * cells - 0.5, 0, cells - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(cells)))


class MixToken:
    """Exchanges a box of the first embedding with that of the batch read backwards, in one forward pass.

    As released: one box for the batch, its share drawn from Beta(alpha, alpha); in the targets, on the
    coarser grid of the positions, the box's edges are rounded down.
    """

    def __init__(self, key: jax.Array, alpha: float):
        self._key, self._alpha = key, alpha

    def __call__(self, x: jax.Array) -> jax.Array:
        """The embedding [batch, [time,] height, width, channels], mixed."""
        share_key, place = jax.random.split(self._key)
        share = jax.random.beta(share_key, self._alpha, self._alpha)
        self._sides = x.shape[-3:-1]
        self._edges = mixing.box_edges(place, share, *self._sides)
        return jnp.where(mixing.box(self._edges, *self._sides)[:, :, None], x[::-1], x)

    def targets(self, whole: jax.Array, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Targets of the images [batch, classes] and of their positions [batch, ..., height, width, classes],
        mixed as the embedding was."""
        sides = dense.shape[-3:-1]
        ratios = [fine // coarse for fine, coarse in zip(self._sides, sides, strict=True)]
        edges = [(low // n, high // n) for (low, high), n in zip(self._edges, ratios, strict=True)]
        inside = mixing.box(edges, *sides)
        kept = 1 - inside.mean()
        dense = jnp.where(inside[:, :, None], dense[::-1], dense)
        return kept * whole + (1 - kept) * whole[::-1], dense


def loss(
    logits: jax.Array,
    dense_logits: jax.Array,
    whole: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    weight: float,
) -> jax.Array:
    """Cross-entropy of the head, plus `weight` times that of the dense head, the mean over positions."""
    positions = optax.softmax_cross_entropy(dense_logits, dense)
    per_image = positions.mean(axis=tuple(range(1, positions.ndim)))
    return losses.cross_entropy(logits, whole, mask) + weight * losses.masked_mean(per_image, mask)
