"""What any query sees, as one HTML page that needs no other file. Its maps are computed where it is looked
at, from queries, keys and kernels.
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

from structvit_jax.explain.maps import Layer
from structvit_jax.explain.picture import in_time

MOST = 24 * 2**20  # bytes of a page, about
_COLOURS = {"positive": "viridis", "signed": "RdBu_r", "kernel": "PuOr_r"}  # matplotlib's


class Shown(NamedTuple):
    """A model on the page."""

    title: str
    says: str  # what it takes the input for
    layers: Mapping[str, Layer]


def build(
    models: Sequence[Shown], pixels: np.ndarray, *, title: str, layer: str, head: int, point: Sequence[float]
) -> str:
    """The page.

    Args:
      models: side by side; the first is the one that the controls are about.
      pixels: uint8 [[time,] height, width, 3], as the first saw them, RGB.
      title: what the input is called.
      layer, head, point: what is shown first; the point in shares of (time, height, width).
    """
    video = pixels.ndim == 4
    frames = pixels if video else pixels[None]
    kept = fitting([model.layers for model in models], layer)
    left_out = len(set().union(*(model.layers for model in models))) - len(kept)
    content = {
        "title": title,
        "about": "Queries and keys are stored in half precision, all else in single."
        + f" {left_out} layers are left out, to keep the page light." * bool(left_out),
        "video": video,
        "size": [frames.shape[2], frames.shape[1]],
        "frames": [_picture(frame) for frame in frames],
        "layer": layer,
        "head": head,
        "query": [0.5] * (not video) + list(point),
        "colours": {name: _stops(colours) for name, colours in _COLOURS.items()},
        "models": [
            {
                "title": model.title,
                "says": model.says,
                "layers": [encoded(own) for own in model.layers.values() if own.name in kept],
            }
            for model in models
        ],
    }
    template = (importlib.resources.files("structvit_jax.explain") / "page.html").read_text("utf-8")
    # A name may hold "</script>"; in JSON a slash may be escaped.
    return template.replace("/*DATA*/", json.dumps(content).replace("</", "<\\/"))


def fitting(models: Sequence[Mapping[str, Layer]], wanted: str, most: int = MOST) -> set[str]:
    """Names of layers whose arrays fit on a page: all, or as many as do, and the one that is wanted."""
    names = list(dict.fromkeys(name for layers in models for name in layers))
    sizes = {name: sum(_size(layers[name]) for layers in models if name in layers) for name in names}
    for count in range(len(names), 0, -1):
        chosen = {names[i] for i in np.linspace(len(names) - 1, 0, count).round().astype(int)} | {wanted}
        if sum(sizes[name] for name in chosen) <= most:
            return chosen
    return {wanted}


def _size(layer: Layer) -> int:
    """Bytes of its queries and keys in base64."""
    return 2 * 2 * layer.x.size * 4 // 3


def encoded(layer: Layer) -> dict[str, Any]:
    """A layer as the page's script takes it. Arrays begin with the head; of the values' kernels it has the
    mean over channels, and the products of each two with each other, summed over window and channels."""
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


def _picture(frame: np.ndarray) -> str:
    file, kind = io.BytesIO(), "png" if max(frame.shape) <= 64 else "jpeg"
    Image.fromarray(frame).save(file, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _stops(name: str) -> list[list[int]]:
    from matplotlib import colormaps  # here: half a second, for those who draw

    return (colormaps[name](np.linspace(0, 1, 33))[:, :3] * 255).round().astype(int).tolist()
