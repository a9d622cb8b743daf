"""Translate the names and layouts of arrays between the released PyTorch UniFormer and this package.

In this package, names are dotted paths, as in checkpoints. Kernels are (*window, in, out), where PyTorch's
are (out, in, *window), and linear layers replace 1x1 convolutions. The PyTorch model has no structure
kernels, so their names and layouts are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from structvit_jax.utils.errors import UserError

Arrays = dict[str, np.ndarray]

# The arrays of each kind of layer: PyTorch's name and the name in this package.
_KINDS = {
    "linear": {"weight": "kernel", "bias": "bias"},  # also convolutions
    "conv_1x1": {"weight": "kernel", "bias": "bias"},  # a linear layer in this package
    "layer_norm": {"weight": "scale", "bias": "bias"},
    "batch_norm": {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
    "scales": {"gamma_1": "gamma_1", "gamma_2": "gamma_2"},
    "scale_maps": {"gamma_1": "gamma_1", "gamma_2": "gamma_2"},  # (1, channels, 1, 1) in PyTorch
    "structure": {"key_kernels": "key_kernels", "value_kernels": "value_kernels"},
}
# PyTorch's step counter of a BatchNorm. It is not used, because the momentum is constant.
_COUNTER = "num_batches_tracked"

# All layers of a UniFormer or StructViT: PyTorch's path, the path in this package ("" if equal), kind.
_FIELDS = {"any": "[1-4]", "conv": "[12]", "attn": "[34]", "block": r"\d+", "n": "[12]"}
_LAYERS = (
    ("patch_embed{any}.proj", "", "linear"),
    ("patch_embed{any}.norm", "", "layer_norm"),
    ("patch_embed{any}.proj.0", "patch_embed{any}.convs.0", "linear"),
    ("patch_embed{any}.proj.1", "patch_embed{any}.norms.0", "batch_norm"),
    ("patch_embed{any}.proj.3", "patch_embed{any}.convs.1", "linear"),
    ("patch_embed{any}.proj.4", "patch_embed{any}.norms.1", "batch_norm"),
    ("blocks{any}.{block}.pos_embed", "", "linear"),
    ("blocks{conv}.{block}.norm{n}", "", "batch_norm"),
    ("blocks{conv}.{block}.conv{n}", "blocks{conv}.{block}.attn.conv{n}", "conv_1x1"),
    ("blocks{conv}.{block}.attn", "blocks{conv}.{block}.attn.depthwise", "linear"),
    ("blocks{conv}.{block}.mlp.fc{n}", "", "conv_1x1"),
    ("blocks{conv}.{block}", "", "scale_maps"),
    ("blocks{attn}.{block}.norm{n}", "", "layer_norm"),
    ("blocks{attn}.{block}.attn.qkv", "", "linear"),
    ("blocks{attn}.{block}.attn.proj", "", "linear"),
    ("blocks{attn}.{block}.attn", "", "structure"),
    ("blocks{attn}.{block}.mlp.fc{n}", "", "linear"),
    ("blocks{attn}.{block}", "", "scales"),
    ("norm", "", "batch_norm"),
    ("head", "", "linear"),
    ("aux_head", "", "linear"),
)


# All arrays of these layers: PyTorch's name, the name in this package, and the kind of the layer.
_ARRAYS = [
    (f"{torch}.{theirs}", f"{here or torch}.{ours}", kind)
    for torch, here, kind in _LAYERS
    for theirs, ours in _KINDS[kind].items()
]


def _pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression for a template with the fields in _FIELDS."""
    escaped = template.replace(".", r"\.")
    return re.compile(re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", escaped))


_FROM_TORCH = [(_pattern(torch), here, kind) for torch, here, kind in _ARRAYS]
_TO_TORCH = [(_pattern(here), torch, kind) for torch, here, kind in _ARRAYS]


def _translate(name: str, table: list[tuple[re.Pattern[str], str, str]]) -> tuple[str, str] | None:
    """Return the translated name of an array and the kind of its layer; None if the name is unknown."""
    for pattern, template, kind in table:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict()), kind
    return None


def from_torch(state_dict: Mapping[str, np.ndarray]) -> Arrays:
    """Convert a PyTorch state dict to the names and layouts of this package; drop BatchNorm's counters.

    Raises:
      UserError: no UniFormer has some of the keys, which the message lists; or the weights are not
        floating-point numbers.
    """
    arrays: Arrays = {}
    unknown: list[str] = []
    for key, value in state_dict.items():
        array, found = np.asarray(value), _translate(key, _FROM_TORCH)
        if found is None:
            unknown += [] if key.endswith(_COUNTER) else [key]
            continue
        if array.dtype.kind not in "fV":  # "V" is the kind of bfloat16
            raise UserError(f"{key} holds {array.dtype} numbers; weights are floating-point numbers")
        name, kind = found
        if name.endswith(".kernel"):
            if array.ndim < 2:
                raise UserError(f"{key} has shape {array.shape}, which is not that of a kernel")
            array = np.moveaxis(array, (1, 0), (-2, -1))
            if kind == "conv_1x1" and set(array.shape[:-2]) <= {1}:
                array = array.reshape(array.shape[-2:])
        elif kind == "scale_maps":
            array = array.reshape(-1)
        arrays[name] = array
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        listed = ", ".join(key[:100] for key in unknown[:5])
        raise UserError(f"keys that no UniFormer has ({len(unknown)}): {listed}{more}")
    return arrays


def to_torch(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Convert arrays of a UniFormer or StructViT to a PyTorch state dict; BatchNorm's counters are 0.

    Raises:
      UserError: the arrays belong to another network, for which there is no released PyTorch model.
    """
    position = arrays.get("blocks1.0.pos_embed.kernel")
    if position is None:
        raise UserError(
            "only UniFormers and StructViTs can be converted to the keys of the released PyTorch model"
        )
    ones = (1,) * (np.ndim(position) - 2)  # axes of a 1x1 window, in images or videos
    state_dict: Arrays = {}
    for name, value in arrays.items():
        if (found := _translate(name, _TO_TORCH)) is None:
            raise UserError(f"{name} has no key in the released PyTorch model")
        array, (key, kind) = np.asarray(value), found
        if name.endswith(".kernel"):
            array = np.moveaxis(array, (-1, -2), (0, 1))
            if kind == "conv_1x1":
                array = array.reshape(*array.shape, *ones)
        elif kind == "scale_maps":
            array = array.reshape(1, -1, *ones)
        state_dict[key] = np.ascontiguousarray(array)
        if name.endswith(".var"):
            state_dict[key.replace("running_var", _COUNTER)] = np.array(0, np.int64)
    return state_dict
