"""Weights from somewhere, with all that has to be known of them: of which model, and what they expect.

Names and shapes tell the model. What they cannot tell (the width of heads, normalisation, the order of
channels) follows from what was released, or is asked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from structvit_jax.convert import files
from structvit_jax.convert.names import Arrays, from_torch
from structvit_jax.errors import UserError, known
from structvit_jax.models.variants import VARIANTS, Variant, get_variant


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What weights expect of a picture."""

    mean: tuple[float, float, float]  # subtracted from channels scaled to 0..1
    std: tuple[float, float, float]  # then divided by
    channels: str = "rgb"  # or "bgr"


_VIDEO = Inputs((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
RELEASED = {  # what UniFormer's weights were trained on: (classes, inputs)
    "imagenet": (1000, Inputs((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "imagenet_half": (1000, Inputs((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    "k400": (400, _VIDEO),
    "k600": (600, _VIDEO),
    "something": (174, dataclasses.replace(_VIDEO, channels="bgr")),
}


@dataclasses.dataclass(frozen=True)
class Source:
    arrays: Arrays  # parameters and batch statistics by our names
    variant: Variant
    model: dict[str, Any]  # arguments of `get_variant` that give the variant
    num_classes: int
    class_names: tuple[str, ...] | None  # None: nothing names them
    inputs: Inputs | None  # None: nothing tells
    where: str  # for messages


def read_released(
    path: str, *, model: str = "", data: str = "", head_width: int = 0, labels: Sequence[str] | None = None
) -> Source:
    """Reads a file of PyTorch weights.

    Args:
      path: a .pth or .safetensors file.
      model: of ours, for files of a StructViT, whose shapes do not tell the stride.
      data: a name in RELEASED, where the number of classes does not tell it.
      head_width: 32 or 64, where the release has both.
      labels: names of the classes, in order.

    Raises:
      UserError: a file that holds no UniFormer, or one of which something has to be said first.
    """
    state_dict = files.read(path)
    try:
        arrays = from_torch(state_dict.arrays)
        arguments, classes = recognise(arrays)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if model and "blocks3.0.attn.key_kernels" in arrays:
        arguments = {**arguments, "name": model}
    if labels is not None and len(labels) != classes:
        raise UserError(f"{path} has {classes} classes, and {len(labels)} names were given")
    where = f"{path} ({state_dict.place})" if state_dict.place else path
    arguments |= _heads(path, arguments, head_width)
    names = None if labels is None else tuple(labels)
    inputs = _inputs(path, arguments, classes, data)
    return Source(arrays, get_variant(**arguments), arguments, classes, names, inputs, where)


def recognise(arrays: Arrays) -> tuple[dict[str, Any], int]:
    """The arguments of `get_variant` that give a model these arrays, and the number of its classes.

    Raises:
      UserError: they are of no model here.
    """
    depths = tuple(_depth(arrays, stage) for stage in range(1, 5))
    if not all(depths) or "head.kernel" not in arrays:
        raise UserError("not a UniFormer: some of its four stages of blocks, or its head, are missing")
    widths = tuple(arrays[f"blocks{stage}.0.norm1.scale"].size for stage in range(1, 5))
    stem = "patch" if "patch_embed1.proj.kernel" in arrays else "conv"
    bases = [
        name
        for name, v in VARIANTS.items()
        if v.network == "uniformer" and (v.depths, v.widths, v.stem) == (depths, widths, stem)
    ]
    if not bases:
        raise UserError(f"no model here has blocks {depths} of widths {widths} with a {stem} stem")
    scaled = [bool(f"blocks{stage}.0.gamma_1" in arrays) for stage in (1, 3)]
    base = next((name for name in bases if _scales(VARIANTS[name]) == scaled), bases[0])
    arguments: dict[str, Any] = {}
    if _scales(VARIANTS[base]) != scaled:
        arguments |= {"layer_scale": 1e-6 if scaled[1] else 0.0, "conv_layer_scale": scaled[0]}
    if "aux_head.kernel" in arrays:
        arguments["token_labels"] = True
    structure = arrays.get("blocks3.0.attn.key_kernels")
    name = base if structure is None else f"{base.replace('uniformer', 'structvit')}_{structure.shape[-1]}_1"
    video = np.ndim(arrays.get("blocks1.0.pos_embed.kernel", ())) == 5
    return {"name": name + "_video" * video, **arguments}, arrays["head.kernel"].shape[-1]


def _depth(arrays: Arrays, stage: int) -> int:
    numbers = {int(m[1]) for name in arrays if (m := re.match(rf"blocks{stage}\.(\d+)\.norm1\.scale$", name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _scales(variant: Variant) -> list[bool]:
    """Whether convolution and attention blocks have layer scales."""
    has = bool(variant.layer_scale)
    return [has and variant.conv_layer_scale, has]


def _heads(path: str, arguments: dict[str, Any], said: int) -> dict[str, int]:
    """The width of heads, where it is not that of our variant of this name."""
    variant = get_variant(**arguments)
    if said:
        return {"head_width": said} if said != variant.head_width else {}
    if variant.stem == "conv" or (arguments.get("token_labels") and variant.layer_scale is None):
        raise UserError(
            f"{path}: shapes do not tell whether its heads are 32 wide, as the authors' first models of this"
            f" kind, or 64, as those whose names end in _dim64; {_say('--head_width=32')} or 64"
        )
    return {}


def _inputs(path: str, arguments: dict[str, Any], classes: int, said: str) -> Inputs:
    if said:
        return RELEASED[known("--data", said, RELEASED)][1]
    if arguments.get("token_labels"):
        raise UserError(
            f"{path}: trained with token labelling, for which the authors' normalisation depends on the"
            f" version of timm; {_say('--data=imagenet')}, or imagenet_half for 0.5 (timm 0.4.12)"
        )
    video = get_variant(**arguments).video
    for name, (count, inputs) in RELEASED.items():
        if count == classes and video == (not name.startswith("imagenet")):
            return inputs
    raise UserError(
        f"{path}: {classes} classes, so nothing tells its normalisation and order of channels;"
        f" {_say('--data=NAME')}, of {', '.join(RELEASED)}"
    )


def _say(flag: str) -> str:
    return f"convert it with python -m structvit_jax.convert SOURCE DESTINATION, and say {flag}"
