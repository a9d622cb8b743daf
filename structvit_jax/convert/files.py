"""Files of PyTorch weights: .pth (and .pt, .bin, .tar) through torch, .safetensors without it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.errors import UserError

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".bin", ".tar")
SUFFIXES = (SAFETENSORS, *TORCH)
# Under which the authors' programs save weights; averaged ones first, as they are what is evaluated.
_PLACES = ("state_dict_ema", "model_ema", "model", "model_state", "state_dict")
_INSTALL = "pip install 'structvit_jax[torch]'"


class StateDict(NamedTuple):
    arrays: dict[str, np.ndarray]  # PyTorch's keys to arrays in PyTorch's layout
    place: str  # under which the file holds them; "" at the top


def is_weights_file(path: str) -> bool:
    """Whether a path names a file of PyTorch weights, and not a run or checkpoint of ours."""
    return str(path).endswith(SUFFIXES)


def read(path: str) -> StateDict:
    """The weights in a file. Of a .pth only tensors and plain containers are loaded: no code of it runs.

    Raises:
      UserError: no such file, one that is damaged or holds something else, or torch is missing.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    content = _safetensors(path) if path.endswith(SAFETENSORS) else _torch_load(path)
    state_dict, place = content, ""
    if isinstance(content, Mapping):
        place = next((name for name in _PLACES if isinstance(content.get(name), Mapping)), "")
        state_dict = content[place] if place else content
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise UserError(f"{path} holds no weights: {_what(content)}")
    arrays = {key.removeprefix("module."): _array(value) for key, value in state_dict.items()}
    if strange := [key for key, array in arrays.items() if array is None]:
        raise UserError(f"{path} holds no weights, or not only: {strange[0]} is no tensor")
    return StateDict(arrays, place)  # type: ignore[arg-type]


def write(path: str, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict: bare in .safetensors, under "model" in .pth.

    Raises:
      UserError: the file is there already, or torch is missing.
    """
    if os.path.exists(path):
        raise UserError(f"{path} is there already; choose another name")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = f"{path}.part"
    if path.endswith(SAFETENSORS):
        import safetensors.numpy

        safetensors.numpy.save_file({key: np.asarray(array) for key, array in state_dict.items()}, part)
    else:
        torch = _torch()
        torch.save({"model": {key: torch.from_numpy(np.array(a)) for key, a in state_dict.items()}}, part)
    os.replace(part, path)


def _safetensors(path: str) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading and writing .pth needs torch: {_INSTALL}, or take .safetensors") from error
    return torch


def _torch_load(path: str) -> Any:
    torch = _torch()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever type: the file may hold anything
        reason = _one_line(error)
        if refused := re.search(r"WeightsUnpickler error: (.*?)(\. |$)", str(error)):
            reason = f"it holds more than weights, which is not loaded ({refused[1]})"
        raise UserError(f"{path} cannot be read: {reason}") from error


def _array(value: Any) -> np.ndarray | None:
    """A tensor of torch or NumPy as an array; halves become float32."""
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "detach"):
            return None
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return value.astype(np.float32) if value.dtype.kind in "fV" else value


def _what(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {', '.join(map(str, list(content)[:5])) or 'nothing in it'}"
    return f"a {type(content).__name__}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
