"""The hyper-parameters of all models, and the grammar of their names."""

from __future__ import annotations

import dataclasses
import fnmatch
import numbers
import re
from collections.abc import Iterator
from typing import Any

from structvit_jax.utils.errors import UserError, check_choice, unknown_choice


@dataclasses.dataclass(frozen=True)
class Variant:
    """The hyper-parameters of a model.

    The name of a model sets `network` and `video`. All other fields can be overridden.
    """

    network: str = "uniformer"  # "uniformer" (four stages) or "deit" (one stage)
    video: bool = False  # whether grids are (time, height, width) instead of (height, width)
    depths: tuple[int, ...] = (3, 4, 8, 3)  # blocks per stage
    widths: tuple[int, ...] = (64, 128, 320, 512)  # channels per stage
    head_width: int = 64  # channels of one attention head
    patch: int = 4  # side and stride of the patches of the first embedding, in pixels
    stem: str = "patch"  # kind of embeddings: "patch", or "conv" for overlapping 3x3 convolutions
    mixer_window: int = 5  # side of the depthwise window in the mixer of convolution blocks
    structure_dim: int = 0  # D, number of structure kernels; 0: plain self-attention, 1: ConvSA
    stride: int = 1  # S, spatial stride of keys and values
    key_window: int | tuple[int, ...] = 3  # sides of the key kernels
    value_window: int | tuple[int, ...] = 3  # sides of the value kernels
    key_kernels: str = "channel"  # "channel" (appendix A) or "shared" (equation 2)
    value_kernels: str = "channel"  # "channel" (appendix A) or "shared" (equation 5)
    aggregation: str = "context"  # "context" (equation 5), or "element" (equation 4): a value window of 1
    kernel_init: str = "normal"  # of the key and value kernels: "normal" or "delta"
    drop_path: float = 0.1  # rate of stochastic depth of the last block; it rises linearly from 0
    layer_scale: float | None = None  # initial scale of the residual branches; None or 0: no layer scale
    conv_layer_scale: bool = True  # whether convolution blocks have layer scale, too
    image_size: int = 224  # DeiT: image side for which positions are learned, in pixels
    num_frames: int = 16  # DeiT video: number of frames for which positions are learned
    tubelet: int = 2  # DeiT video: number of frames per token
    token_labels: bool = False  # add a dense head, which classifies every position (token labelling)
    remat: str = "none"  # "none", or rematerialisation by "dots" or "full" (see blocks.py)
    kernels: str = "auto"  # "auto": as set by `ops.use_kernels` (fast kernels); "reference": plain JAX
    dtype: str = "float32"  # dtype of the computation: "float32" or "bfloat16"; parameters are float32

    @property
    def grid_axes(self) -> int:
        return 3 if self.video else 2

    @property
    def compute_dtype(self) -> str | None:
        """The dtype of the computation. None is for float32, and also allows inputs in float64."""
        return None if self.dtype == "float32" else self.dtype

    @property
    def smallest_input(self) -> tuple[int, ...]:
        """The smallest ([time,] height, width) with which every grid has at least one position."""
        if self.network == "deit":
            return (self.tubelet,) * self.video + (self.patch, self.patch)
        side = self.patch * 8 if self.stem == "patch" else 1
        return (1,) * self.video + (side, side)


OVERRIDES = tuple(
    field.name for field in dataclasses.fields(Variant) if field.name not in ("network", "video")
)
_ONLY_IN = {  # fields of one network only
    "uniformer": ("stem", "mixer_window", "conv_layer_scale", "token_labels"),
    "deit": ("image_size", "num_frames", "tubelet"),
}

_S = Variant()
_B = Variant(depths=(5, 8, 20, 7), drop_path=0.3)
_L = Variant(depths=(5, 10, 24, 7), widths=(128, 192, 448, 640), drop_path=0.4, layer_scale=1e-6)
_TINY = Variant(
    depths=(1, 1, 2, 1), widths=(16, 32, 48, 64), head_width=16, patch=2, mixer_window=3, drop_path=0.0,
)  # fmt: skip
_DEIT_S = Variant(network="deit", depths=(12,), widths=(384,), patch=16)
_DEIT_TINY = Variant(  # with tubelets of one frame, only attention can detect motion
    network="deit", depths=(2,), widths=(32,), head_width=16, patch=8, drop_path=0.0,
    image_size=24, num_frames=8, tubelet=1,
)  # fmt: skip

# StructViT and DeiT-Struct have no entries: they are these models with structural self-attention.
VARIANTS: dict[str, Variant] = {
    "uniformer_s": _S,
    "uniformer_s_plus": dataclasses.replace(_S, depths=(3, 5, 9, 3), head_width=32, stem="conv"),
    "uniformer_b": _B,
    "uniformer_b_ls": dataclasses.replace(_B, layer_scale=1e-6, conv_layer_scale=False),
    "uniformer_l": _L,
    "uniformer_tiny": _TINY,
    "deit_s": _DEIT_S,
    "deit_tiny": _DEIT_TINY,
}
_IMAGES_ONLY = {
    "uniformer_s_plus": "its convolution stem is defined for images",
    "uniformer_b_ls": "its layer scale was released for images",
}
_LISTED = ("4_1", "4_2", "8_1")  # D and stride S of the models in the paper's tables

_LARGEST, _MOST_BLOCKS = 2**16, 1000  # largest integer hyper-parameter, and largest sum of depths

_CHOICES = {
    "stem": ("patch", "conv"),
    "key_kernels": ("channel", "shared"),
    "value_kernels": ("channel", "shared"),
    "aggregation": ("context", "element"),
    "kernel_init": ("normal", "delta"),
    "remat": ("none", "dots", "full"),
    "kernels": ("auto", "reference"),
    "dtype": ("float32", "bfloat16"),
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of models that match a shell pattern, such as "structvit_*_video".

    Only the D and S of the paper are listed; `create_model` takes any others, too.
    """
    names = list(VARIANTS)
    names += [f"structvit_{size}_{ds}" for size in ("s", "b", "l", "tiny") for ds in _LISTED]
    names += [f"deit_{size}_struct_{d}" for size in ("s", "tiny") for d in (1, 2, 4, 8)]
    names += [f"{name}_video" for name in names if name not in _IMAGES_ONLY]
    return sorted(fnmatch.filter(names, pattern))


def counterpart(name: str) -> str:
    """Return the name of the image model for that of a video model, and vice versa."""
    if name.endswith("_video"):
        return name.removesuffix("_video")
    return "uniformer_b_video" if name in _IMAGES_ONLY else f"{name}_video"


def get_variant(name: str, **overrides: Any) -> Variant:
    """Return the variant with this name, with some fields overridden.

    Raises:
      UserError: a name or override is unknown, a value is invalid or does not fit the others, or the name
        ends in "_video" but the model is for images only.
    """
    variant = _by_name(name)
    for key, value in overrides.items():
        check_choice("override", key, OVERRIDES)
        for network, fields in _ONLY_IN.items():
            if key in fields and variant.network != network:
                raise UserError(f"{name}: {key} is not used by this model, only in a {network}")
        if isinstance(value, list):
            overrides[key] = tuple(value)
    if overrides.get("aggregation") == "element" and overrides.get("value_window", 1) != 1:
        raise UserError(f"{name}: aggregation='element' means a value window of 1; leave value_window out")
    variant = dataclasses.replace(variant, **overrides)
    for problem in _problems(variant):
        raise UserError(f"{name}: {problem}")
    return variant


def _by_name(name: str) -> Variant:
    base, video = name.removesuffix("_video"), name.endswith("_video")
    if video and base in _IMAGES_ONLY:
        reason = _IMAGES_ONLY[base]
        raise UserError(
            f"{base} has no video variant ({reason} only); see uniformer_s_video and uniformer_b_video"
        )
    structured: dict[str, Any] = {}
    if match := re.fullmatch(r"structvit_(s|b|l|tiny)_([1-9]\d{0,4})_([1-9]\d{0,4})", base):
        base = f"uniformer_{match[1]}"
        structured = {"structure_dim": int(match[2]), "stride": int(match[3])}
    elif match := re.fullmatch(r"(deit_s|deit_tiny)_struct_([1-9]\d{0,4})", base):
        base, structured = match[1], {"structure_dim": int(match[2])}
    if base not in VARIANTS:
        raise unknown_choice("model", name, list_models())
    return dataclasses.replace(VARIANTS[base], video=video, **structured)


def _problems(v: Variant) -> Iterator[str]:
    """Yield the problems of a variant, each as one line."""
    values = dataclasses.asdict(v)
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key} is {values[key]!r}; it takes one of {', '.join(map(repr, choices))}"
    stages = {"uniformer": 4, "deit": 1}[v.network]
    for key in ("depths", "widths"):
        sizes = values[key]
        if not isinstance(sizes, tuple) or len(sizes) != stages or not all(map(_is_positive, sizes)):
            yield f"{key} is {sizes!r}; a {v.network} takes {stages} positive integers up to {_LARGEST}"
            return  # the other checks need valid depths and widths
    if sum(v.depths) > _MOST_BLOCKS:
        yield f"depths is {v.depths!r}, more than {_MOST_BLOCKS} blocks"
    for key in ("head_width", "patch", "stride", "image_size", "num_frames", "tubelet"):
        if not _is_positive(values[key]):
            yield f"{key} is {values[key]!r}; it takes a positive integer up to {_LARGEST}"
    if not _is_positive(v.mixer_window) or v.mixer_window % 2 == 0:
        yield f"mixer_window is {v.mixer_window!r}; it takes an odd side"
    for key in ("key_window", "value_window"):
        sides = values[key] if isinstance(values[key], tuple) else (values[key],) * v.grid_axes
        if len(sides) != v.grid_axes or not all(_is_positive(k) and k % 2 for k in sides):
            yield f"{key} is {values[key]!r}; it takes an odd side, or {v.grid_axes} of them"
    if v.structure_dim != 0 and not _is_positive(v.structure_dim):
        yield f"structure_dim is {v.structure_dim!r}; it takes 0 (plain self-attention) or a positive integer"
    if v.structure_dim == 0 and v.stride != 1:
        yield f"stride is {v.stride} without structure_dim; plain self-attention has no window to stride"
    for width in v.widths[-2:]:
        if width % v.head_width:
            yield f"width {width} is not a multiple of head_width {v.head_width}"
    if v.layer_scale is not None and not (isinstance(v.layer_scale, (int, float)) and v.layer_scale >= 0):
        yield f"layer_scale is {v.layer_scale!r}; it takes None, 0 (off) or a positive number"
    if not (isinstance(v.drop_path, (int, float)) and 0 <= v.drop_path < 1):
        yield f"drop_path is {v.drop_path!r}; it takes a rate from 0 to below 1"
    if v.stem == "conv" and (v.video or v.patch != 4):
        yield "stem='conv' is defined for images with patch 4 only"


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 < int(value) <= _LARGEST
