"""A picture of the first training batch as the model gets it: `--mode=data`."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from structvit_jax.runtime import storage
from structvit_jax.training.step import prepare_batch, step_keys

_ROWS, _COLUMNS = (
    16,
    8,
)  # examples below each other (of images, beside each other too), frames beside each other
_SMALLEST = 96  # pixels that a picture is shown in, at least
_TEXT = 14  # height of a line


def write(config: ml_collections.ConfigDict, data: Any, path: epath.Path) -> int:
    """Draws rows of the first batch, augmented on the host and on the device, with their targets.

    Returns how many rows it drew.
    """
    with contextlib.closing(data.train_batches(config.data.batch_size, start_step=0)) as batches:
        batch = next(batches)
    arrays: dict[str, Any] = {key: np.asarray(batch[key]) for key in ("inputs", "labels", "mask")}
    _, key = step_keys(config, 0)
    prepared = prepare_batch(key, arrays, len(data.class_names), config)
    inputs, targets = prepared["inputs"], prepared["targets"]
    pixels = np.asarray(inputs) * np.array(config.data.std) + np.array(config.data.mean)
    pixels = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    names = {problem.id: problem.reason for problem in batch["problems"]}
    captions = [_caption(row, data.class_names) for row in np.asarray(targets)]
    for row in np.flatnonzero(~arrays["mask"]):
        identity = data.train_id(int(batch["index"][row]))
        captions[row] = f"left out: {identity}: {names.get(identity, '')}"
    if data.unit == "images":
        sheet = _grid([[_picture(p)] for p in pixels[: _COLUMNS * _ROWS]], captions, beside=_COLUMNS)
    else:
        shown = evenly_spaced(pixels.shape[1], _COLUMNS)
        sheet = _grid([[_picture(clip[frame]) for frame in shown] for clip in pixels[:_ROWS]], captions)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, file.getvalue())
    return min(len(pixels), _COLUMNS * _ROWS if data.unit == "images" else _ROWS)


def evenly_spaced(frames: int, most: int) -> np.ndarray:
    """The frames of a clip to show, the first and the last among them."""
    return np.unique(np.linspace(0, frames - 1, min(most, frames)).astype(int))


def _caption(target: np.ndarray, class_names: tuple[str, ...]) -> str:
    """The classes that a target gives weight to, beyond what label smoothing gives all."""
    extra = target - target.min()
    shares = extra / max(extra.sum(), 1e-9)
    first = np.argsort(-shares)[:2]
    return ", ".join(f"{class_names[i]} {shares[i]:.2f}" for i in first if shares[i] > 0.005)


def _picture(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    times = -(-_SMALLEST // min(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _grid(rows: list[list[Image.Image]], captions: list[str], beside: int = 1) -> Image.Image:
    """Rows of pictures with a caption above each, several rows beside each other."""
    side, gap = rows[0][0].size, 4
    wide, high = len(rows[0]) * (side[0] + gap), side[1] + _TEXT + gap
    sheet = Image.new("RGB", (wide * min(beside, len(rows)), high * -(-len(rows) // beside)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pictures, caption) in enumerate(zip(rows, captions, strict=False)):
        left, top = number % beside * wide, number // beside * high
        draw.text((left + 2, top), caption[: wide // 6], fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (side[0] + gap), top + _TEXT))
    return sheet
