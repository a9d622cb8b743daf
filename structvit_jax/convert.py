"""Weights of the released PyTorch UniFormer, as arrays, into a UniFormer of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from structvit_jax.errors import UserError

Model = TypeVar("Model", bound=nnx.Module)

# Our parameter paths, joined by dots, to PyTorch's keys. Everything not named here is equal.
_RENAMES: list[tuple[str, Any]] = [
    (r"^(blocks[12]\.\d+)\.attn\.depthwise\.", r"\1.attn."),
    (r"^(blocks[12]\.\d+)\.attn\.(conv[12])\.", r"\1.\2."),
    (r"^(patch_embed\d)\.convs\.(\d)\.", lambda m: f"{m[1]}.proj.{3 * int(m[2])}."),
    (r"^(patch_embed\d)\.norms\.(\d)\.", lambda m: f"{m[1]}.proj.{3 * int(m[2]) + 1}."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.mean$", ".running_mean"),
    (r"\.var$", ".running_var"),
]


def torch_key(path: Sequence[Any]) -> str:
    """The PyTorch key of one of our parameters or batch statistics."""
    key = ".".join(map(str, path))
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def load_uniformer(model: Model, state_dict: Mapping[str, np.ndarray]) -> Model:
    """Copies a PyTorch UniFormer's weights into `model`, a UniFormer of ours, and returns it.

    Args:
      model: made by `create_model("uniformer_...")`, image or video as the weights are.
      state_dict: PyTorch's keys to NumPy arrays in PyTorch's layout.

    Raises:
      UserError: naming every missing, extra and misshapen key at once; the model is unchanged then.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    problems, unused, arrays = [], dict(state_dict), []
    for path, leaf in nnx.to_flat_state(state):
        key = torch_key(path)
        if key not in unused:
            problems.append(f"missing {key}")
            continue
        array = _to_ours(np.asarray(unused.pop(key)), leaf.shape)
        if array.shape != leaf.shape:
            problems.append(
                f"misshapen {key}: {np.shape(state_dict[key])} gives {array.shape}, not {leaf.shape}"
            )
        arrays.append((path, leaf.replace(jnp.asarray(array, leaf.dtype))))
    problems += [f"extra {key}" for key in unused if not key.endswith("num_batches_tracked")]
    if problems:
        raise UserError(f"{len(problems)} keys do not fit the model: {'; '.join(problems)}")
    nnx.update(model, nnx.from_flat_state(arrays))
    return model


def _to_ours(array, shape):
    """PyTorch's layout (out, in, *window) to (*window, in, out), without or with more sides of one
    where `shape` says so (1x1 convolutions, layer scales of shape (1, C, 1, 1))."""
    if array.ndim > 1:
        array = array.transpose(*range(2, array.ndim), 1, 0)
    if [n for n in array.shape if n != 1] == [n for n in shape if n != 1]:
        array = array.reshape(shape)
    return array
