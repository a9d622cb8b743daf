"""Weights from a file or checkpoint, with all that is known of them: model, classes and inputs.

Names and shapes of the arrays determine the model. What they leave open (the width of heads, normalisation,
the order of channels, the names of the classes) is in the description that `structvit convert`
writes beside exported weights, follows from what was released, or has to be given.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.convert import description, files
from structvit_jax.convert.description import Description, Inputs
from structvit_jax.convert.names import Arrays, from_torch
from structvit_jax.models.variants import VARIANTS, Variant, get_variant
from structvit_jax.utils.errors import UserError, check_choice

_MOST_PATTERNS = 256  # structure kernels of a file; a model needs memory in proportion


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

    arrays: Arrays  # parameters and batch statistics by our names
    variant: Variant
    model: dict[str, Any]  # arguments of `get_variant` that give the variant
    num_classes: int
    class_names: tuple[str, ...] | None  # in the order of the head's outputs; None if unknown
    inputs: Inputs | None  # None if unknown
    where: str  # for messages
    notes: tuple[str, ...] = ()  # what was decided in reading them, a line each

    def with_class_names(self, names: Sequence[str], where: str) -> Source:
        """Return the same weights with other names for their classes; `where` the names are from.

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
    path: str, *, model: str = "", data: str = "", head_width: int = 0, which: str = ""
) -> Source:
    """Read a file of PyTorch weights.

    Args:
      path: a .pth or .safetensors file.
      model: name of the model, for files of a StructViT without a description: shapes leave the stride open.
      data: a name in RELEASED, where the number of classes does not determine it.
      head_width: 32 or 64, where the release has both.
      which: "raw" or "ema", of files that hold both; "" takes the raw weights, if there are any.

    Raises:
      UserError: a file that holds no UniFormer, or one of which something has to be given.
    """
    state_dict = files.read(path, which)
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
        arguments |= _heads(path, arguments, head_width)
    notes = _choice(path, state_dict)
    if data or inputs is None:
        release = _release(path, arguments, classes, data)
        inputs = release.inputs
        if names is None and release.classes == classes:
            names = release.class_names()
            notes.append(f"class names: those of {release.title}, in the order of the released weights")
    where = f"{path} ({state_dict.place})" if state_dict.place else path
    return Source(arrays, get_variant(**arguments), arguments, classes, names, inputs, where, tuple(notes))


def _choice(path: str, state_dict: files.StateDict) -> list[str]:
    """Return a note on which weights were taken, where the file holds raw and averaged ones."""
    if not state_dict.other:
        return []
    averaged = "ema" in state_dict.place
    kinds = ("averaged", "raw") if averaged else ("raw", "averaged")
    flag = f"--weights={files.RAW if averaged else files.AVERAGED}"
    return [
        f"weights: {state_dict.place!r}, the {kinds[0]} ones; the file also holds {state_dict.other!r}, the"
        f" {kinds[1]} ones: {flag} of structvit convert takes those"
    ]


def recognise(arrays: Arrays) -> tuple[dict[str, Any], int]:
    """Return the arguments of `get_variant` that give a model these arrays, and the number of its classes.

    Raises:
      UserError: they are of no model here.
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
    patterns = facts["structure_dim"]
    name = f"{base.replace('uniformer', 'structvit')}_{patterns}_1" if patterns else base
    return {"name": name + "_video" * facts["video"], **arguments}, arrays["head.kernel"].shape[-1]


def _facts(arrays: Arrays) -> dict[str, Any]:
    """Return the fields of the variant that the arrays' names and shapes determine.

    Raises:
      UserError: arrays of no UniFormer, or of sizes that no model has.
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
            if kernels.ndim != 5 + video or kernels.shape[-1] > _MOST_PATTERNS:
                raise UserError(f"blocks3.0.attn.{part}_kernels has a shape of no StructViT: {kernels.shape}")
            facts |= {"structure_dim": kernels.shape[-1], f"{part}_window": kernels.shape[:-3]}
    return facts


def _depth(arrays: Arrays, stage: int) -> int:
    numbers = {int(m[1]) for name in arrays if (m := re.match(rf"blocks{stage}\.(\d+)\.norm1\.scale$", name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _scales(variant: Variant) -> list[bool]:
    """Whether convolution and attention blocks have layer scales."""
    has = bool(variant.layer_scale)
    return [has and variant.conv_layer_scale, has]


def _heads(path: str, arguments: dict[str, Any], given: int) -> dict[str, int]:
    """Return the width of heads, where it is not that of the variant of this name."""
    variant = get_variant(**arguments)
    if given:
        return {"head_width": given} if given != variant.head_width else {}
    if variant.stem == "conv" or (arguments.get("token_labels") and variant.layer_scale is None):
        raise UserError(
            f"{path}: shapes do not determine whether its heads are 32 wide, as in the authors' first models"
            f" of this kind, or 64, as those whose names end in _dim64; {_give('--head_width=32')} or 64"
        )
    return {}


def _release(path: str, arguments: dict[str, Any], classes: int, given: str) -> Release:
    """Return the data set that weights without a description were trained on."""
    if given:
        return RELEASED[check_choice("--data", given, RELEASED)]
    if arguments.get("token_labels"):
        raise UserError(
            f"{path}: trained with token labelling, for which the authors' normalisation depends on the"
            f" version of timm; {_give('--data=imagenet')}, or imagenet_half for 0.5 (timm 0.4.12)"
        )
    video = get_variant(**arguments).video
    for release in RELEASED.values():
        if release.classes == classes and release.video == video:
            return release
    raise UserError(
        f"{path}: {classes} classes, so its normalisation and channel order are unknown;"
        f" {_give('--data=NAME')}, of {', '.join(RELEASED)}"
    )


def _give(flag: str) -> str:
    return f"convert it with structvit convert SOURCE DESTINATION, and give {flag}"
