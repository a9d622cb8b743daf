"""Photographs of garments in synthetic motion: Fashion-MNIST, or other grey images in IDX files.

Validation clips ("tune") show training images.
"""

from __future__ import annotations

import cv2
import numpy as np

from structvit_jax.data import idx_files
from structvit_jax.data.folder import Layout
from structvit_jax.data.motion import Drift, DriftOrTurn
from structvit_jax.utils.errors import UserError

_SIDE = 16  # of a garment, in pixels


class MovingGarments(Drift):
    """Clips of one drifting garment, 8 frames of 32 x 32 pixels; see `Drift`."""

    name = "moving_garments"

    def __init__(self, root: str, split: str, examples: int, seed: int):
        sprites, origin = _sprites(self.name, root, split)
        super().__init__(sprites, split, examples, seed, origin)


class GarmentMotions(DriftOrTurn):
    """Clips of a garment that drifts or turns, 8 frames of 32 x 32 pixels; see `DriftOrTurn`."""

    name = "garment_motions"

    def __init__(self, root: str, split: str, examples: int, seed: int):
        sprites, origin = _sprites(self.name, root, split)
        super().__init__(sprites, split, examples, seed, origin)


def _sprites(name: str, root: str, split: str) -> tuple[np.ndarray, str]:
    """Return the images that clips of a split show, and the digests of their files.

    The images are float32 [images, side, side], grey from 0 to 1.
    """
    if not idx_files.is_idx(root):
        raise UserError(f"{name}: set --config.data.root to a folder of IDX files, such as Fashion-MNIST")
    train, test = idx_files.find_splits(Layout(root))
    arrays = idx_files.read_split(root, test if split == "test" else train)
    sprites = [cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for image in arrays.images]
    return np.stack(sprites).astype(np.float32) / 255, arrays.digests_text
