"""Resize learned position embeddings as PyTorch does, for inputs of other sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_A = -0.75  # parameter of the cubic kernel in PyTorch; jax.image.resize and Pillow use -0.5


def resize_positions(positions: jax.Array | np.ndarray, grid: tuple[int, ...]) -> jax.Array:
    """Resize positions [*old_grid, width] to [*grid, width] along every axis of the grid.

    In two dimensions this equals `torch.nn.functional.interpolate` with mode="bicubic" and
    align_corners=False, without antialiasing.
    """
    positions = jnp.asarray(positions)
    for axis, size in enumerate(grid):
        if positions.shape[axis] != size:
            matrix = jnp.asarray(_matrix(positions.shape[axis], size), positions.dtype)
            resized = jnp.tensordot(matrix, positions, (1, axis), precision=jax.lax.Precision.HIGHEST)
            positions = jnp.moveaxis(resized, 0, axis)
    return positions


def _matrix(old: int, new: int) -> np.ndarray:
    """Return the weights [new, old] of cubic interpolation, which repeats the values at the edges."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(centres) + tap
        weights = _cubic(np.abs(centres - index))
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1).astype(int)), weights)
    return matrix


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Return the cubic kernel at these distances, which are not negative."""
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
