"""Weights from a file or checkpoint, with their model, classes and input normalisation.

Names and shapes of the arrays determine the model, except for the width of heads, the input normalisation,
the channel order and the class names. These come from the description that `structvit convert` writes beside
exported weights, from the table of releases, or from the user.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.convert import description, weight_files
from structvit_jax.convert.array_names import Arrays, from_torch
from structvit_jax.convert.description import Description, Inputs
from structvit_jax.models.variants import VARIANTS, Variant, get_variant
from structvit_jax.utils.errors import UserError, check_choice

_LARGEST_STRUCTURE_DIM = 256  # that is read from a file: a model's memory grows with it


class Release(NamedTuple):
    """A data set that UniFormer's weights were released for."""

    classes: int
    names: str  # file in convert/classes with the class names, in the order of the head's outputs
    inputs: Inputs
    title: str

    @property
    def video(self) -> bool:
        return not self.names.startswith("imagenet")

    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of the released heads; classes/SOURCES.md has their origin."""
        folder = importlib.resources.files("structvit_jax.convert") / "classes"
        return tuple((folder / self.names).read_text(encoding="utf-8").splitlines())


_IMAGE = Inputs((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = Inputs((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_VIDEO = Inputs((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
RELEASED = {
    "imagenet": Release(1000, "imagenet.txt", _IMAGE, "ImageNet"),
    "imagenet_half": Release(1000, "imagenet.txt", _HALF, "ImageNet"),
    "k400": Release(400, "kinetics400.txt", _VIDEO, "Kinetics-400"),
    "k600": Release(600, "kinetics600.txt", _VIDEO, "Kinetics-600"),
    # V1 and V2 have the same classes, and released heads of both have them in the same order.
    "something": Release(174, "something.txt", _VIDEO._replace(channels="bgr"), "Something-Something"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from or to convert."""

    arrays: Arrays  # parameters and batch statistics, by the names of this package
    variant: Variant
    model: dict[str, Any]  # arguments of `get_variant` that give the variant
    num_classes: int
    class_names: tuple[str, ...] | None  # in the order of the head's outputs; None if unknown
    inputs: Inputs | None  # None if unknown
    where: str  # for messages
    notes: tuple[str, ...] = ()  # choices made while reading, to print, one line each

    def with_class_names(self, names: Sequence[str], where: str) -> Source:
        """Return the same weights with other names for their classes.

        Args:
          names: in the order of the head's outputs.
          where: the origin of the names, for messages.

        Raises:
          UserError: not one distinct name for each class.
        """
        try:
            description.check_class_names(names, self.num_classes)
        except UserError as error:
            raise UserError(f"{where} does not fit {self.where}: {error}") from error
        note = f"class names: {where}"
        return dataclasses.replace(self, class_names=tuple(names), notes=(*self.notes, note))


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
      model: name of the model, for a StructViT without a description: shapes do not determine the stride.
      data: a name in RELEASED, if the number of classes does not determine it.
      head_width: 32 or 64, if UniFormers of this size were released with both.
      which: "raw" or "ema", for files that hold both; None prefers the raw weights.

    Raises:
      UserError: a file that holds no UniFormer, or one that needs a further argument.
    """
    state_dict = weight_files.read(path, which)
    try:
        arrays = from_torch(state_dict.arrays)
        if state_dict.description is None:
            arguments, classes = recognise(arrays)
            about = Description(arguments, None, None)
        else:
            facts, classes = _facts(arrays), arrays["head.kernel"].shape[-1]
            about = description.parse(state_dict.description, facts, classes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    arguments, names, inputs = about
    if state_dict.description is None:
        if model and "blocks3.0.attn.key_kernels" in arrays:
            arguments = {**arguments, "name": model}
        arguments |= _head_width(path, arguments, head_width)
    notes = _choice_notes(state_dict)
    if data or inputs is None:
        release = _release(path, arguments, classes, data)
        inputs = release.inputs
        if names is None and release.classes == classes:
            names = release.class_names()
            notes.append(f"class names: those of {release.title}, in the order of the released weights")
    where = f"{path} ({state_dict.place})" if state_dict.place else path
    return Source(arrays, get_variant(**arguments), arguments, classes, names, inputs, where, tuple(notes))


def _choice_notes(state_dict: weight_files.StateDict) -> list[str]:
    """Return a note on which weights were taken, if the file holds raw and averaged ones."""
    if not state_dict.other:
        return []
    if state_dict.kind == weight_files.RAW:
        kind, other, option = "raw", "averaged", weight_files.AVERAGED
    else:
        kind, other, option = "averaged", "raw", weight_files.RAW
    return [
        f"weights: {state_dict.place!r}, the {kind} ones; the file also holds {state_dict.other!r}, the"
        f" {other} ones, which structvit convert takes with --weights={option}"
    ]


def recognise(arrays: Arrays) -> tuple[dict[str, Any], int]:
    """Return the arguments of `get_variant` for the model of these arrays, and the number of its classes.

    Raises:
      UserError: no model here has such arrays.
    """
    facts = _facts(arrays)
    shape = tuple(facts[key] for key in ("depths", "widths", "stem"))
    bases = [
        name
        for name, v in VARIANTS.items()
        if v.network == "uniformer" and (v.depths, v.widths, v.stem) == shape
    ]
    if not bases:
        raise UserError(f"no model here has blocks {shape[0]} of widths {shape[1]} with a {shape[2]} stem")
    scaled = [bool(f"blocks{stage}.0.gamma_1" in arrays) for stage in (1, 3)]
    base = next((name for name in bases if _scales(VARIANTS[name]) == scaled), bases[0])
    arguments: dict[str, Any] = {}
    if _scales(VARIANTS[base]) != scaled:
        arguments |= {"layer_scale": 1e-6 if scaled[1] else 0.0, "conv_layer_scale": scaled[0]}
    if facts["token_labels"]:
        arguments["token_labels"] = True
    dim = facts["structure_dim"]
    name = f"{base.replace('uniformer', 'structvit')}_{dim}_1" if dim else base
    return {"name": name + "_video" * facts["video"], **arguments}, arrays["head.kernel"].shape[-1]


def _facts(arrays: Arrays) -> dict[str, Any]:
    """Return the fields of the variant that names and shapes of the arrays determine.

    Raises:
      UserError: arrays that are not a UniFormer's, or have impossible shapes.
    """
    depths = tuple(_depth(arrays, stage) for stage in range(1, 5))
    needed: tuple[str, ...] = ("head.kernel", "blocks1.0.pos_embed.kernel", "blocks1.0.attn.depthwise.kernel")
    if "patch_embed1.proj.kernel" in arrays:
        needed += ("patch_embed1.proj.kernel",)
    if not all(depths) or any(np.ndim(arrays.get(name, 0)) < 2 for name in needed):
        raise UserError("not a UniFormer: some of its four stages of blocks, or its head, are missing")
    if empty := [name for name, array in arrays.items() if not array.size]:
        raise UserError(f"{empty[0]} is empty")
    video = arrays["blocks1.0.pos_embed.kernel"].ndim == 5
    facts = {
        "network": "uniformer",
        "video": video,
        "depths": depths,
        "widths": tuple(arrays[f"blocks{stage}.0.norm1.scale"].size for stage in range(1, 5)),
        "stem": "patch" if "patch_embed1.proj.kernel" in arrays else "conv",
        "mixer_window": arrays["blocks1.0.attn.depthwise.kernel"].shape[0],
        "token_labels": "aux_head.kernel" in arrays,
        "structure_dim": 0,
    }
    if facts["stem"] == "patch":
        facts["patch"] = arrays["patch_embed1.proj.kernel"].shape[-3]
    for part in ("key", "value"):
        kernels = arrays.get(f"blocks3.0.attn.{part}_kernels")
        if kernels is not None:
            if kernels.ndim != 5 + video or kernels.shape[-1] > _LARGEST_STRUCTURE_DIM:
                raise UserError(
                    f"blocks3.0.attn.{part}_kernels has shape {kernels.shape}, which no StructViT has"
                )
            facts |= {"structure_dim": kernels.shape[-1], f"{part}_window": kernels.shape[:-3]}
    return facts


def _depth(arrays: Arrays, stage: int) -> int:
    """Return the number of blocks of a stage; 0 if they are not numbered from 0 on."""
    numbers = {int(m[1]) for name in arrays if (m := re.match(rf"blocks{stage}\.(\d+)\.norm1\.scale$", name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _scales(variant: Variant) -> list[bool]:
    """Return whether convolution blocks and attention blocks have layer scales."""
    has = bool(variant.layer_scale)
    return [has and variant.conv_layer_scale, has]


def _head_width(path: str, arguments: dict[str, Any], given: int | None) -> dict[str, int]:
    """Return the width of heads as an argument, if it differs from that of the named variant."""
    variant = get_variant(**arguments)
    if given:
        return {"head_width": given} if given != variant.head_width else {}
    if variant.stem == "conv" or (arguments.get("token_labels") and variant.layer_scale is None):
        raise UserError(
            f"{path}: shapes do not determine whether its heads are 32 wide, as in the first models of this"
            f" kind, or 64, as in those whose names end in _dim64; {_give('--head_width=32')} or 64"
        )
    return {}


def _release(path: str, arguments: dict[str, Any], classes: int, given: str | None) -> Release:
    """Return the release that weights without a description belong to."""
    if given:
        return RELEASED[check_choice("--data", given, RELEASED)]
    if arguments.get("token_labels"):
        raise UserError(
            f"{path}: trained with token labelling, so its normalisation depends on the authors' version of"
            f" timm; {_give('--data=imagenet')}, or imagenet_half for 0.5 (timm 0.4.12)"
        )
    video = get_variant(**arguments).video
    for release in RELEASED.values():
        if release.classes == classes and release.video == video:
            return release
    raise UserError(
        f"{path}: nothing was released with {classes} classes, so normalisation and channel order are"
        f" unknown; {_give('--data=NAME')}, one of {', '.join(RELEASED)}"
    )


def _give(flag: str) -> str:
    return f"convert the file with structvit convert SOURCE DESTINATION {flag}"
