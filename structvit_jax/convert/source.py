"""Weights from a file or checkpoint, with their model, classes and inputs.

The names and shapes of the arrays determine most of the model. They do not determine the width of attention
heads, the stride of a StructViT, the normalisation, the channel order and the class names. These come from
the description that `structvit convert` saves with exported weights, from the table `RELEASED`, or from the
user.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.convert import description, weight_files
from structvit_jax.convert.array_names import Arrays, from_torch
from structvit_jax.convert.description import Inputs
from structvit_jax.models.variants import VARIANTS, Variant, get_variant
from structvit_jax.utils.errors import UserError, check_choice

_LARGEST_STRUCTURE_DIM = 256  # a limit for untrusted files, because the memory of a model grows with D


class Release(NamedTuple):
    """A data set for which UniFormer weights were released."""

    title: str
    classes: int
    names: str  # name of the file in convert/classes with the class names, in the order of the released heads
    video: bool
    inputs: Inputs

    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of the released heads; see classes/SOURCES.md."""
        folder = importlib.resources.files("structvit_jax.convert") / "classes"
        return tuple((folder / self.names).read_text(encoding="utf-8").splitlines())


_IMAGE = Inputs((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = Inputs((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_VIDEO = Inputs((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
RELEASED = {
    "imagenet": Release("ImageNet", 1000, "imagenet.txt", False, _IMAGE),
    # Models with token labelling, if they were trained with timm 0.4.12, which normalises with 0.5.
    "imagenet_half": Release("ImageNet", 1000, "imagenet.txt", False, _HALF),
    "k400": Release("Kinetics-400", 400, "kinetics400.txt", True, _VIDEO),
    "k600": Release("Kinetics-600", 600, "kinetics600.txt", True, _VIDEO),
    # V1 and V2 have the same classes, and released heads of both have them in the same order.
    "something": Release("Something-Something", 174, "something.txt", True, _VIDEO._replace(channels="bgr")),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from or to convert."""

    arrays: Arrays  # parameters and batch statistics, by the names of this package
    variant: Variant
    model: dict[str, Any]  # arguments of `get_variant` for this variant
    num_classes: int
    class_names: tuple[str, ...] | None  # in the order of the head's outputs; None if unknown
    inputs: Inputs | None  # None if unknown
    where: str  # path of the file or checkpoint, for messages
    notes: tuple[str, ...] = ()  # choices that were made while reading; printed, one line each


def read_released(
    path: str,
    *,
    model: str | None = None,
    data: str | None = None,
    head_width: int | None = None,
    which: str | None = None,
) -> Source:
    """Read a file of PyTorch weights.

    Args:
      path: a .pth or .safetensors file.
      model: name of the model; needed for a StructViT without a description, because shapes do not determine
        the stride.
      data: a name in RELEASED; needed if the number of classes does not determine it.
      head_width: 32 or 64; needed if UniFormers of this size were released with both.
      which: "raw" or "ema", for files that hold both; None prefers the raw weights.

    Raises:
      UserError: the file holds no UniFormer or StructViT, or one of the arguments is needed.
    """
    state_dict = weight_files.read(path, which)
    class_names = inputs = None
    try:
        arrays = from_torch(state_dict.arrays)
        facts = _facts(arrays)
        classes = arrays["head.kernel"].shape[-1]
        if state_dict.description is None:
            arguments = _recognise(arrays, facts)
        else:
            arguments, class_names, inputs = description.parse(state_dict.description, facts, classes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if state_dict.description is None:
        if model and facts["structure_dim"]:
            arguments["name"] = model
        arguments |= _head_width(path, arguments, head_width)
    notes = [state_dict.note] if state_dict.note else []
    if data or inputs is None:
        release = _release(path, arguments, classes, data)
        inputs = release.inputs
        if class_names is None and release.classes == classes:
            class_names = release.class_names()
            notes.append(f"class names: those of {release.title}, in the order of the released weights")
    where = f"{path} ({state_dict.key})" if state_dict.key else path
    variant = get_variant(**arguments)
    return Source(arrays, variant, arguments, classes, class_names, inputs, where, tuple(notes))


def _facts(arrays: Arrays) -> dict[str, Any]:
    """Return the fields of the variant that the names and shapes of the arrays determine.

    Raises:
      UserError: the arrays are not those of a UniFormer or StructViT, or have impossible shapes.
    """
    depths = tuple(_depth(arrays, stage) for stage in range(1, 5))
    stem = "patch" if "patch_embed1.proj.kernel" in arrays else "conv"
    convolutions = ["blocks1.0.pos_embed.kernel", "blocks1.0.attn.depthwise.kernel"]
    convolutions += ["patch_embed1.proj.kernel"] * (stem == "patch")
    are_complete = all(depths) and "head.kernel" in arrays
    if not are_complete or any(np.ndim(arrays.get(name, 0)) not in (4, 5) for name in convolutions):
        raise UserError("not a UniFormer: some of its four stages of blocks, or its head, are missing")
    if empty := [name for name, array in arrays.items() if not array.size]:
        raise UserError(f"{empty[0]} is empty")
    video = arrays["blocks1.0.pos_embed.kernel"].ndim == 5
    facts = {
        "network": "uniformer",
        "video": video,
        "depths": depths,
        "widths": tuple(arrays[f"blocks{stage}.0.norm1.scale"].size for stage in range(1, 5)),
        "stem": stem,
        "mixer_window": arrays["blocks1.0.attn.depthwise.kernel"].shape[0],
        "token_labels": "aux_head.kernel" in arrays,
        "structure_dim": 0,
    }
    if stem == "patch":
        facts["patch"] = arrays["patch_embed1.proj.kernel"].shape[-3]
    for part in ("key", "value"):
        name = f"blocks3.0.attn.{part}_kernels"
        if name in arrays:
            shape = arrays[name].shape
            if len(shape) != 5 + video or shape[-1] > _LARGEST_STRUCTURE_DIM:
                raise UserError(f"{name} has shape {shape}, which no StructViT has")
            facts |= {"structure_dim": shape[-1], f"{part}_window": shape[:-3]}
    return facts


def _depth(arrays: Arrays, stage: int) -> int:
    """Return the number of blocks of a stage; 0 if they are not numbered 0, 1, 2 and so on."""
    numbers = {int(m[1]) for name in arrays if (m := re.match(rf"blocks{stage}\.(\d+)\.norm1\.scale$", name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _recognise(arrays: Arrays, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `get_variant` for the model of these arrays.

    Several models may have the same size, and differ only in which blocks have layer scales. If no model has
    the layer scales of the arrays, the first model is used. `adapt` then folds the scales into other layers,
    or sets them to one.

    Raises:
      UserError: no model here has such arrays.
    """
    depths, widths, stem = facts["depths"], facts["widths"], facts["stem"]
    bases = [
        name
        for name, v in VARIANTS.items()
        if (v.network, v.depths, v.widths, v.stem) == ("uniformer", depths, widths, stem)
    ]
    if not bases:
        raise UserError(f"no model here has blocks {depths} of widths {widths} with a {stem} stem")
    scaled = [f"blocks{stage}.0.gamma_1" in arrays for stage in (1, 3)]
    base = next((name for name in bases if _scaled_blocks(VARIANTS[name]) == scaled), bases[0])
    dim = facts["structure_dim"]
    name = f"{base.replace('uniformer', 'structvit')}_{dim}_1" if dim else base
    arguments: dict[str, Any] = {"name": name + "_video" * facts["video"]}
    if facts["token_labels"]:
        arguments["token_labels"] = True
    return arguments


def _scaled_blocks(variant: Variant) -> list[bool]:
    """Return two values: whether convolution blocks, and whether attention blocks, have layer scales."""
    return [bool(variant.layer_scale) and variant.conv_layer_scale, bool(variant.layer_scale)]


def _head_width(path: str, arguments: dict[str, Any], given: int | None) -> dict[str, int]:
    """Return {"head_width": width} if the width differs from that of the named variant, and else {}."""
    variant = get_variant(**arguments)
    if given:
        return {"head_width": given} if given != variant.head_width else {}
    if variant.stem == "conv" or (variant.token_labels and variant.layer_scale is None):
        raise UserError(
            f"{path}: shapes do not determine whether its attention heads are 32 wide (the first released"
            f" files of this kind) or 64 (files whose names end in _dim64);"
            f" {_convert_with('--head_width=32')} or 64"
        )
    return {}


def _release(path: str, arguments: dict[str, Any], classes: int, given: str | None) -> Release:
    """Return the release whose inputs the weights expect."""
    if given:
        return RELEASED[check_choice("--data", given, RELEASED)]
    variant = get_variant(**arguments)
    if variant.token_labels:
        raise UserError(
            f"{path}: it was trained with token labelling, so its normalisation depends on the authors'"
            f" version of timm; {_convert_with('--data=imagenet')}, or --data=imagenet_half for mean and std"
            " 0.5 (timm 0.4.12)"
        )
    for release in RELEASED.values():
        if (release.classes, release.video) == (classes, variant.video):
            return release
    raise UserError(
        f"{path}: no released {'video' if variant.video else 'image'} model has {classes} classes, so the"
        f" normalisation and channel order are unknown; {_convert_with('--data=NAME')}, where NAME is one of"
        f" {', '.join(RELEASED)}"
    )


def _convert_with(flag: str) -> str:
    return f"convert the file with structvit convert SOURCE DESTINATION {flag}"
