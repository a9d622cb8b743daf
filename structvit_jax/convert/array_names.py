"""Names and layouts of the released PyTorch UniFormer and of this package, in both directions.

Names here are dotted paths, as in checkpoints. PyTorch's kernels are (out, in, *window), kernels here
(*window, in, out), and 1x1 convolutions are linear layers. Structure kernels, which the PyTorch model does
not have, keep their name and layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from structvit_jax.utils.errors import UserError

Arrays = dict[str, np.ndarray]


class _Layout(NamedTuple):
    """The layout of an array in PyTorch, as two inverse transforms."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, int], np.ndarray]  # also takes the number of axes of the model's grid


def _kernel_from_torch(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (1, 0), (-2, -1))


def _kernel_to_torch(array: np.ndarray, axes: int) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1))


def _pointwise_from_torch(array: np.ndarray) -> np.ndarray:
    array = _kernel_from_torch(array)
    return array.reshape(array.shape[-2:]) if set(array.shape[:-2]) <= {1} else array


def _pointwise_to_torch(array: np.ndarray, axes: int) -> np.ndarray:
    return array.T.reshape(*array.shape[::-1], *(1,) * axes)


_SAME = _Layout(lambda array: array, lambda array, axes: array)
_KERNEL = _Layout(_kernel_from_torch, _kernel_to_torch)  # (out, in, *window)
_POINTWISE = _Layout(_pointwise_from_torch, _pointwise_to_torch)  # (out, in, 1, 1), here (in, out)
_CHANNELS = _Layout(  # (1, channels, 1, 1), here (channels,)
    lambda array: array.reshape(-1), lambda array, axes: array.reshape(1, -1, *(1,) * axes)
)

# Parameters and statistics of a layer: PyTorch's name, the name here, and PyTorch's layout.
_Parts = tuple[tuple[str, str, _Layout], ...]
_LINEAR: _Parts = (("weight", "kernel", _KERNEL), ("bias", "bias", _SAME))  # or a convolution
_CONV_1X1: _Parts = (("weight", "kernel", _POINTWISE), ("bias", "bias", _SAME))
_LAYER_NORM: _Parts = (("weight", "scale", _SAME), ("bias", "bias", _SAME))
_BATCH_NORM: _Parts = (*_LAYER_NORM, ("running_mean", "mean", _SAME), ("running_var", "var", _SAME))
_COUNTER = "num_batches_tracked"  # of a BatchNorm; unused, since its momentum is constant

# All layers of a UniFormer or StructViT: PyTorch's path, the path here ("" if equal), and what it holds.
_FIELDS = {"any": "[1-4]", "conv": "[12]", "attn": "[34]", "block": r"\d+", "n": "[12]"}
_LAYERS: tuple[tuple[str, str, _Parts], ...] = (
    ("patch_embed{any}.proj", "", _LINEAR),
    ("patch_embed{any}.norm", "", _LAYER_NORM),
    ("patch_embed{any}.proj.0", "patch_embed{any}.convs.0", _LINEAR),
    ("patch_embed{any}.proj.1", "patch_embed{any}.norms.0", _BATCH_NORM),
    ("patch_embed{any}.proj.3", "patch_embed{any}.convs.1", _LINEAR),
    ("patch_embed{any}.proj.4", "patch_embed{any}.norms.1", _BATCH_NORM),
    ("blocks{any}.{block}.pos_embed", "", _LINEAR),
    ("blocks{conv}.{block}.norm{n}", "", _BATCH_NORM),
    ("blocks{conv}.{block}.conv{n}", "blocks{conv}.{block}.attn.conv{n}", _CONV_1X1),
    ("blocks{conv}.{block}.attn", "blocks{conv}.{block}.attn.depthwise", _LINEAR),
    ("blocks{conv}.{block}.mlp.fc{n}", "", _CONV_1X1),
    ("blocks{conv}.{block}", "", (("gamma_1", "gamma_1", _CHANNELS), ("gamma_2", "gamma_2", _CHANNELS))),
    ("blocks{attn}.{block}.norm{n}", "", _LAYER_NORM),
    ("blocks{attn}.{block}.attn.qkv", "", _LINEAR),
    ("blocks{attn}.{block}.attn.proj", "", _LINEAR),
    ("blocks{attn}.{block}.attn", "", tuple((k, k, _SAME) for k in ("key_kernels", "value_kernels"))),
    ("blocks{attn}.{block}.mlp.fc{n}", "", _LINEAR),
    ("blocks{attn}.{block}", "", (("gamma_1", "gamma_1", _SAME), ("gamma_2", "gamma_2", _SAME))),
    ("norm", "", _BATCH_NORM),
    ("head", "", _LINEAR),
    ("aux_head", "", _LINEAR),
)


# The name of each array in PyTorch and here, as templates, and its layout.
_ROWS = [
    (f"{torch}.{their_part}", f"{here or torch}.{part}", layout)
    for torch, here, parts in _LAYERS
    for their_part, part, layout in parts
]


def _pattern(template: str) -> re.Pattern[str]:
    escaped = template.replace(".", r"\.")
    return re.compile(re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", escaped))


_FROM_TORCH = [(_pattern(torch), here, layout) for torch, here, layout in _ROWS]
_TO_TORCH = [(_pattern(here), torch, layout) for torch, here, layout in _ROWS]


def _translate(name: str, table: list[tuple[re.Pattern[str], str, _Layout]]) -> tuple[str, _Layout] | None:
    """Return the other name and the layout of an array; None if no model here has it."""
    for pattern, template, layout in table:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict()), layout
    return None


def from_torch(state_dict: Mapping[str, np.ndarray]) -> Arrays:
    """Return a PyTorch state dict with the names and layouts of this package, without BatchNorm's counters.

    Raises:
      UserError: keys that no UniFormer has, all at once; or weights that are not floating-point numbers.
    """
    arrays: Arrays = {}
    unknown: list[str] = []
    for key, value in state_dict.items():
        array, found = np.asarray(value), _translate(key, _FROM_TORCH)
        if found is None:
            unknown += [] if key.endswith(_COUNTER) else [key]
        elif array.dtype.kind not in "fV":  # V is bfloat16
            raise UserError(f"{key} holds {array.dtype} numbers; weights are floating-point numbers")
        else:
            name, layout = found
            try:
                arrays[name] = layout.from_torch(array)
            except np.exceptions.AxisError as error:
                raise UserError(f"{key} has shape {array.shape}, which is not that of a kernel") from error
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        listed = ", ".join(key[:100] for key in unknown[:5])
        raise UserError(f"keys that no UniFormer has ({len(unknown)}): {listed}{more}")
    return arrays


def to_torch(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Return arrays of a UniFormer or StructViT as a PyTorch state dict; BatchNorm's counters are 0.

    Raises:
      UserError: weights of a DeiT, which the PyTorch model does not have.
    """
    position = arrays.get("blocks1.0.pos_embed.kernel")
    if position is None:
        raise UserError("only UniFormers and StructViTs have keys of the released PyTorch model")
    axes = np.ndim(position) - 2
    state_dict: Arrays = {}
    for name, array in arrays.items():
        if (found := _translate(name, _TO_TORCH)) is None:
            raise UserError(f"{name} has no key in the released PyTorch model")
        key, layout = found
        state_dict[key] = np.ascontiguousarray(layout.to_torch(np.asarray(array), axes))
        if name.endswith(".var"):
            state_dict[key.replace("running_var", _COUNTER)] = np.array(0, np.int64)
    return state_dict
