"""Build the interactive page of `structvit explain`.

The page contains the queries, keys and kernels of the layers. Its script computes the maps of any query from
them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from structvit_jax.analysis import html
from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.choice import Choice
from structvit_jax.analysis.explain.maps import Layer
from structvit_jax.data.reader import Crop

MAX_BYTES = 24 * 2**20  # approximate size of a page; layers are omitted until it fits
_MAX_PIXELS = 6 * 10**6  # total of all frames
EncodedLayer = dict[str, str | int | list[int]]


class ModelView(NamedTuple):
    """A model on the page."""

    title: str
    predicted: str  # the most probable classes
    verdict: str  # the true class, and whether the prediction is right
    is_right: bool | None  # None if the true class is unknown
    layers: Mapping[str, Layer]
    crop: Crop  # the part of the frames that the model saw


def build(
    models: Sequence[ModelView], frames: np.ndarray, choice: Choice, *, title: str, smooth: bool = True
) -> str:
    """Return the page.

    Args:
      models: models to show side by side; the user selects query, layer and head in the first.
      frames: uint8 [time, height, width, 3], RGB, as recorded; an image is a video of one frame.
      choice: the initial layer, head and query.
      title: heading of the page.
      smooth: whether maps are initially interpolated between positions.
    """
    urls = [_frame_url(frame, _MAX_PIXELS / len(frames)) for frame in frames]
    names = fitting_layers([model.layers for model in models], choice.layer, MAX_BYTES - sum(map(len, urls)))
    omitted = len(set().union(*(model.layers for model in models))) - len(names)
    about = f"Each map has its own colour scale: {overlay.SCALES}."
    if omitted:
        about += f" {omitted} layers are omitted to keep the page small."
    is_video = len(choice.point) == 3
    data = {
        "video": is_video,
        "size": [frames.shape[2], frames.shape[1]],
        "frames": urls,
        "layer": choice.layer,
        "head": choice.head,
        "query": [0.5] * (not is_video) + list(choice.point),
        "smooth": smooth,
        "clipped": overlay.CLIPPED,
        "colours": {
            name: {
                kind: overlay.colour_table(name, translucent=kind == "over")[::5].tolist()
                for kind in ("plain", "over")
            }
            for name in overlay.COLOURS
        },
        "models": [
            {
                "crop": list(model.crop),
                "layers": [encode_layer(layer) for layer in model.layers.values() if layer.name in names],
            }
            for model in models
        ],
    }
    return html.render("explain.html", title=title, about=about, models=models, data=data)


def fitting_layers(
    models: Sequence[Mapping[str, Layer]], required: str, max_bytes: int = MAX_BYTES
) -> set[str]:
    """Return the names of the layers to put on a page: `required`, and as many evenly spaced ones as fit."""
    names = list(dict.fromkeys(name for layers in models for name in layers))
    sizes = {name: sum(encoded_size(layers[name]) for layers in models if name in layers) for name in names}
    for count in range(len(names), 0, -1):
        chosen = {names[i] for i in np.linspace(len(names) - 1, 0, count).round().astype(int)} | {required}
        if sum(sizes[name] for name in chosen) <= max_bytes:
            return chosen
    return {required}


def encoded_size(layer: Layer) -> int:
    """Return the size in bytes of a layer's arrays in base64 (float16 queries and keys, float32 kernels)."""
    key, value = layer.kernels()
    kernels = key.size // key.shape[-3] + value.size // (value.shape[-3] * value.shape[-2])
    return (2 * 2 * layer.x.size + 4 * kernels * layer.attention.heads) * 4 // 3


def encode_layer(layer: Layer) -> EncodedLayer:
    """Return a layer for the page's script: the shapes of its grids, and its arrays in base64, heads first.

    Value kernels are averaged over channels. "factor" is the matrix R of the QR decomposition of the value
    kernels [window and channels, D] of each head; the script computes the effective rank from it.
    """
    is_image, heads = len(layer.grid) == 2, layer.attention.heads
    query, key, _ = (np.moveaxis(np.asarray(x, np.float32), -2, 0) for x in layer.operands())
    kernels = layer.kernels()
    key_kernels, value_kernels = (_by_head(array, heads) for array in kernels)
    key_window, value_window = ([1] * is_image + list(array.shape[:-3]) for array in kernels)
    expanded = np.broadcast_to(
        value_kernels, (*value_kernels.shape[:2], query.shape[-1], layer.structure_dim)
    )
    return {
        "name": layer.name,
        "kind": layer.kind,
        "heads": heads,
        "channels": query.shape[-1],
        "structure_dim": layer.structure_dim,
        "stride": layer.attention.stride,
        "grid": [1] * is_image + list(layer.grid),
        "key_grid": [1] * is_image + list(layer.key_grid),
        "key_window": key_window,
        "value_window": value_window,
        "key_channels": key_kernels.shape[2],
        "q": _base64(query, np.float16),
        "k": _base64(key, np.float16),
        "key_kernels": _base64(np.moveaxis(key_kernels, -1, -2)),
        "value_kernels": _base64(value_kernels.mean(axis=2)),
        "factor": _base64(
            np.asarray(np.linalg.qr(expanded.reshape(heads, -1, layer.structure_dim), mode="r"))
        ),
    }


def _by_head(kernels: np.ndarray, heads: int) -> np.ndarray:
    """[*window, heads or 1, channels or 1, D] -> [heads, taps, channels or 1, D]."""
    taps = kernels.reshape(-1, *kernels.shape[-3:])
    return np.moveaxis(np.broadcast_to(taps, (len(taps), heads, *taps.shape[2:])), 1, 0)


def _base64(array: np.ndarray, dtype: DTypeLike = np.float32) -> str:
    little_endian = np.ascontiguousarray(array).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()


def _frame_url(frame: np.ndarray, max_pixels: float) -> str:
    """Return a frame as a data URL; frames of more than `max_pixels` are downscaled."""
    height, width = frame.shape[:2]
    scale = (max_pixels / (height * width)) ** 0.5
    if scale < 1:
        frame = overlay.resized_frame(frame, round(height * scale), round(width * scale))
    return html.image_url(frame, lossless=max(frame.shape) <= 64)
