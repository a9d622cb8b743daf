"""Names and layouts of the released PyTorch UniFormer, to ours and back.

Ours are dotted paths, as in checkpoints. PyTorch's kernels are (out, in, *window), ours (*window, in, out);
1x1 convolutions are linear layers here. Structure kernels, which PyTorch's model has not, keep our layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from structvit_jax.utils.errors import UserError

Arrays = dict[str, np.ndarray]

# What a key says before its last word, theirs and ours. What no row names is equal.
_TO_OURS: tuple[tuple[str, Any], ...] = (
    (r"^(blocks[12]\.\d+)\.attn$", r"\1.attn.depthwise"),
    (r"^(blocks[12]\.\d+)\.(conv[12])$", r"\1.attn.\2"),
    (r"^(patch_embed\d)\.proj\.([03])$", lambda m: f"{m[1]}.convs.{int(m[2]) // 3}"),
    (r"^(patch_embed\d)\.proj\.([14])$", lambda m: f"{m[1]}.norms.{int(m[2]) // 3}"),
)
_TO_TORCH: tuple[tuple[str, Any], ...] = (
    (r"^(blocks[12]\.\d+)\.attn\.depthwise$", r"\1.attn"),
    (r"^(blocks[12]\.\d+)\.attn\.(conv[12])$", r"\1.\2"),
    (r"^(patch_embed\d)\.convs\.(\d)$", lambda m: f"{m[1]}.proj.{3 * int(m[2])}"),
    (r"^(patch_embed\d)\.norms\.(\d)$", lambda m: f"{m[1]}.proj.{3 * int(m[2]) + 1}"),
)
_LAST_TO_OURS = {"running_mean": "mean", "running_var": "var"}
_LAST_TO_TORCH = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"  # says nothing, since BatchNorm's momentum is constant
_POINTWISE = r"blocks[12]\.\d+\.(mlp\.fc[12]|attn\.conv[12])\.kernel"
_CONV_SCALE = r"blocks[12]\.\d+\.gamma_[12]"

_AFFINE = r"\.(scale|bias)"
_BATCH_NORM = r"\.(scale|bias|mean|var)"
_LINEAR = r"\.(kernel|bias)"
_KNOWN = re.compile(  # all that a UniFormer or a StructViT can hold
    rf"patch_embed[1-4]\.(norm{_AFFINE}|(proj|convs\.[01]){_LINEAR}|norms\.[01]{_BATCH_NORM})"
    rf"|blocks[12]\.\d+\.(norm[12]{_BATCH_NORM}|attn\.(conv[12]|depthwise){_LINEAR})"
    rf"|blocks[34]\.\d+\.(norm[12]{_AFFINE}|attn\.(qkv|proj){_LINEAR}|attn\.(key|value)_kernels)"
    rf"|blocks[1-4]\.\d+\.((pos_embed|mlp\.fc[12]){_LINEAR}|gamma_[12])"
    rf"|norm{_BATCH_NORM}|(aux_)?head{_LINEAR}"
)


def from_torch(state_dict: Mapping[str, np.ndarray]) -> Arrays:
    """Return a PyTorch UniFormer's state dict in our names and layouts, without BatchNorm's counters.

    Raises:
      UserError: keys that no UniFormer has, all at once; or weights that are not floating-point numbers.
    """
    ours, strange = {}, []
    for key, value in state_dict.items():
        name, array = _ours(key, np.asarray(value))
        if _KNOWN.fullmatch(name):
            if array.dtype.kind not in "fV":  # V is bfloat16
                raise UserError(f"{key} holds {array.dtype} numbers; weights are floating-point numbers")
            ours[name] = array
        elif not key.endswith(_COUNTER):
            strange.append(key)
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        listed = ", ".join(key[:100] for key in strange[:5])
        raise UserError(f"{len(strange)} keys that no UniFormer has: {listed}{more}")
    return ours


def to_torch(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Return our arrays under PyTorch's keys and in its layouts; BatchNorm's counters are 0.

    Raises:
      UserError: weights of a DeiT, which the PyTorch model does not have.
    """
    position = arrays.get("blocks1.0.pos_embed.kernel")
    if position is None:
        raise UserError("UniFormers and StructViTs alone have keys of the released PyTorch model")
    video = np.ndim(position) == 5
    theirs = {}
    for name, array in arrays.items():
        theirs[torch_key(name)] = _torch_layout(name, np.asarray(array), video)
        if name.endswith(".var"):
            theirs[torch_key(name).replace("running_var", _COUNTER)] = np.array(0, np.int64)
    return theirs


def torch_key(name: str) -> str:
    """The PyTorch key of one of our parameters or batch statistics."""
    path, _, last = name.rpartition(".")
    return f"{_renamed(path, _TO_TORCH)}.{_LAST_TO_TORCH.get(last, last)}"


def _renamed(path: str, table: tuple[tuple[str, Any], ...]) -> str:
    for pattern, replacement in table:
        path = re.sub(pattern, replacement, path)
    return path


def _ours(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    path, _, last = key.rpartition(".")
    last = _LAST_TO_OURS.get(last, last)
    if last == "weight":
        last = "kernel" if array.ndim > 1 else "scale"
    name = f"{_renamed(path, _TO_OURS)}.{last}"
    if last == "kernel":
        array = array.transpose(*range(2, array.ndim), 1, 0)
    if re.fullmatch(_POINTWISE, name) and set(array.shape[:-2]) <= {1}:
        array = array.reshape(array.shape[-2:])
    if re.fullmatch(_CONV_SCALE, name):
        array = array.reshape(-1)
    return name, array


def _torch_layout(name: str, array: np.ndarray, video: bool) -> np.ndarray:
    if name.endswith(".kernel"):
        array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    ones = (1,) * (3 if video else 2)
    if re.fullmatch(_POINTWISE, name):
        array = array.reshape(*array.shape, *ones)
    if re.fullmatch(_CONV_SCALE, name):
        array = array.reshape(1, -1, *ones)
    return np.ascontiguousarray(array)
