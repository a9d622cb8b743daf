"""Write what any query sees as one HTML page that needs no other file. A script on the page computes the maps
from queries, keys and kernels.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.maps import Layer
from structvit_jax.analysis.explain.picture import in_time
from structvit_jax.data.reader import Crop

MOST = 24 * 2**20  # bytes of a page, about
_PIXELS = 6 * 10**6  # of all frames together


class Shown(NamedTuple):
    """A model on the page."""

    title: str
    predicted: str  # its most probable classes
    layers: Mapping[str, Layer]
    verdict: str  # the true class, and whether the prediction is right
    right: bool | None  # None if unknown
    crop: Crop  # the part of the frames that it saw


def build(
    models: Sequence[Shown],
    frames: np.ndarray,
    *,
    video: bool,
    title: str,
    layer: str,
    head: int,
    point: Sequence[float],
    smooth: bool = True,
) -> str:
    """Return the page.

    Args:
      models: side by side; the first is the one that the controls are about.
      frames: uint8 [time, height, width, 3], RGB, as recorded; an image has a time of one.
      video: whether the input is a video.
      title: above the page.
      layer, head, point: what is shown first; the point in fractions of the first model's input.
      smooth: whether maps are interpolated at first.
    """
    pictures = [_picture(frame, _PIXELS / len(frames)) for frame in frames]
    kept = fitting([model.layers for model in models], layer, MOST - sum(map(len, pictures)))
    left_out = len(set().union(*(model.layers for model in models))) - len(kept)
    content = {
        "title": title,
        "about": f"Each map has its own colour scale: {overlay.SCALES}."
        + f" {left_out} layers are left out to keep the page small." * bool(left_out),
        "video": video,
        "size": [frames.shape[2], frames.shape[1]],
        "frames": pictures,
        "layer": layer,
        "head": head,
        "query": [0.5] * (not video) + list(point),
        "smooth": smooth,
        "clipped": overlay.CLIPPED,
        "colours": {
            name: {"plain": _stops(name, over=False), "over": _stops(name, over=True)}
            for name in overlay.COLOURS
        },
        "models": [
            {
                "title": model.title,
                "predicted": model.predicted,
                "verdict": model.verdict,
                "right": model.right,
                "crop": list(model.crop),
                "layers": [encoded(own) for own in model.layers.values() if own.name in kept],
            }
            for model in models
        ],
    }
    template = (importlib.resources.files("structvit_jax.analysis.explain") / "page.html").read_text("utf-8")
    # Without "<", no text of the data ends the script or starts a comment in it.
    return template.replace("/*DATA*/", json.dumps(content).replace("<", "\\u003c"))


def fitting(models: Sequence[Mapping[str, Layer]], wanted: str, most: int = MOST) -> set[str]:
    """Return the names of layers whose arrays fit on a page: all, or as many as do, and the wanted one."""
    names = list(dict.fromkeys(name for layers in models for name in layers))
    sizes = {name: sum(_size(layers[name]) for layers in models if name in layers) for name in names}
    for count in range(len(names), 0, -1):
        chosen = {names[i] for i in np.linspace(len(names) - 1, 0, count).round().astype(int)} | {wanted}
        if sum(sizes[name] for name in chosen) <= most:
            return chosen
    return {wanted}


def _size(layer: Layer) -> int:
    """Bytes of its arrays in base64: queries and keys of two bytes, kernels of four."""
    key, value = layer.kernels()
    kernels = key.size // key.shape[-3] + value.size // (value.shape[-3] * value.shape[-2])
    return (2 * 2 * layer.x.size + 4 * kernels * layer.attention.heads) * 4 // 3


def encoded(layer: Layer) -> dict[str, Any]:
    """Return a layer as the page's script reads it. Arrays begin with the head; value kernels are given as
    their mean over channels, and as the products of each two, summed over window and channels."""
    axes, heads = len(layer.grid), layer.attention.heads
    query, key, _ = (np.moveaxis(np.asarray(x, np.float32), -2, 0) for x in layer.operands())
    key_kernels, value_kernels = (_by_head(kernels, heads) for kernels in layer.kernels())
    windows = [in_time(np.zeros(k.shape[:-3]), axes).shape for k in layer.kernels()]
    whole = (*value_kernels.shape[:2], query.shape[-1], layer.patterns)
    full = np.broadcast_to(value_kernels, whole)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "heads": heads,
        "channels": query.shape[-1],
        "patterns": layer.patterns,
        "stride": layer.attention.stride,
        "grid": [1] * (axes == 2) + list(layer.grid),
        "key_grid": [1] * (axes == 2) + list(layer.key_grid),
        "key_window": list(windows[0]),
        "value_window": list(windows[1]),
        "key_channels": key_kernels.shape[2],
        "q": _text(query, np.float16),
        "k": _text(key, np.float16),
        "key_kernels": _text(np.moveaxis(key_kernels, -1, -2)),
        "value_kernels": _text(value_kernels.mean(axis=2)),
        "gram": _text(np.einsum("hmcd,hmce->hde", full, full)),
    }


def _by_head(kernels: np.ndarray, heads: int) -> np.ndarray:
    """[*window, heads or 1, channels or 1, D] -> [heads, taps, channels or 1, D]."""
    taps = kernels.reshape(-1, *kernels.shape[-3:])
    return np.moveaxis(np.broadcast_to(taps, (len(taps), heads, *taps.shape[2:])), 1, 0)


def _text(array: np.ndarray, dtype: Any = np.float32) -> str:
    little = np.ascontiguousarray(array).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()


def _picture(frame: np.ndarray, pixels: float) -> str:
    """A frame as a URL, scaled to at most a number of pixels."""
    height, width = frame.shape[:2]
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    frame = overlay.enlarged(frame, round(height * scale), round(width * scale)) if scale < 1 else frame
    file, kind = io.BytesIO(), "png" if max(frame.shape) <= 64 else "jpeg"
    Image.fromarray(frame).save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _stops(name: str, *, over: bool) -> list[list[int]]:
    return overlay.stops(name, over=over)[::5].tolist()
