"""Draw the first training batch as the model sees it: `structvit show --data`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from structvit_jax.analysis.contact_sheet import contact_sheet, evenly_spaced, side_by_side
from structvit_jax.data import Dataset
from structvit_jax.runtime import storage
from structvit_jax.training.step import prepare_batch, step_keys

_MAX_CLIPS, _MAX_FRAMES = 16, 8  # each clip is a row of frames
_MAX_IMAGES, _IMAGE_COLUMNS = 128, 8
_MIN_SIDE = 96  # pixels; smaller frames are enlarged


def write(config: ml_collections.ConfigDict, dataset: Dataset, path: epath.Path) -> int:
    """Draw examples of the first batch, after all augmentation, with their targets, as a PNG at `path`.

    Returns:
      The number of examples drawn.

    Raises:
      UserError: `path` is not a regular file.
    """
    stream: Any = dataset.train_batches(config.data.batch_size, start_step=0)
    with contextlib.closing(stream) as batches:
        batch = next(batches)
    arrays: dict[str, Any] = {key: np.asarray(batch[key]) for key in ("inputs", "labels", "mask")}
    _, key = step_keys(config, 0)
    prepared = prepare_batch(key, arrays, len(dataset.class_names), config)
    pixels = np.asarray(prepared["inputs"]) * np.array(config.data.std) + np.array(config.data.mean)
    pixels = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)

    captions = [_caption(target, dataset.class_names) for target in np.asarray(prepared["targets"])]
    reasons = {problem.id: problem.reason for problem in batch["problems"]}
    for row in np.flatnonzero(~arrays["mask"]):
        name = dataset.train_id(int(batch["index"][row]))
        captions[row] = f"unreadable: {name}: {reasons.get(name, '')}"

    if is_image := len(dataset.shape) == 3:
        rows = pixels[:_MAX_IMAGES, None]
    else:
        rows = pixels[:_MAX_CLIPS, evenly_spaced(pixels.shape[1], _MAX_FRAMES)]
    scale = -(-_MIN_SIDE // min(rows.shape[2:4]))
    rows = rows.repeat(scale, axis=2).repeat(scale, axis=3)
    columns = _IMAGE_COLUMNS if is_image else 1
    file = io.BytesIO()
    contact_sheet([side_by_side(row) for row in rows], captions[: len(rows)], columns).save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, file.getvalue())
    return len(rows)


def _caption(target: np.ndarray, class_names: Sequence[str]) -> str:
    """Return the (at most) two classes with the largest weights in a target; label smoothing is removed."""
    weights = target - target.min()
    weights = weights / max(weights.sum(), 1e-9)
    largest = np.argsort(-weights)[:2]
    return ", ".join(f"{class_names[i]} {weights[i]:.2f}" for i in largest if weights[i] > 0.005)
