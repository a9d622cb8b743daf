"""Files of PyTorch weights: .pth (and .pt, .bin, .tar) through torch, .safetensors without it.

A file is untrusted: its code is never run, and sizes are checked before memory is allocated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.utils.errors import UserError, parse_json
from structvit_jax.utils.paths import write_errors_as_user_error

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".bin", ".tar")
SUFFIXES = (SAFETENSORS, *TORCH)
DESCRIPTION = "structvit_jax"  # key beside the weights, see structvit_jax.convert.description
RAW, AVERAGED = "raw", "ema"  # the trained weights, and their moving average
# Names under which the authors' programs save weights. Their evaluation scripts load the raw ones.
_PLACES = {RAW: ("model", "model_state", "state_dict"), AVERAGED: ("model_ema", "state_dict_ema")}
_FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of safetensors
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")  # for counters
_LONGEST_DESCRIPTION = 2**24  # characters
_INSTALL = "pip install 'structvit_jax[torch]'"


class StateDict(NamedTuple):
    """The weights in a file."""

    arrays: dict[str, np.ndarray]  # PyTorch's keys to arrays in PyTorch's layout
    place: str  # the name under which the file holds them; "" at the top level
    other: str  # the name of the raw or averaged weights that were not taken; "" if there are none
    description: Any  # plain data beside them, not validated; None if there are none
    kind: str = RAW  # or AVERAGED


def is_weights_file(path: str) -> bool:
    """Return whether a path names a file of PyTorch weights, not a run or checkpoint."""
    return str(path).endswith(SUFFIXES)


def read(path: str, which: str | None = None) -> StateDict:
    """Read the weights in a file. No code in it is run: only tensors and plain containers are loaded.

    Args:
      path: the file.
      which: RAW or AVERAGED, for files that hold both; None prefers the raw weights.

    Raises:
      UserError: no such file, a file that is damaged or holds something else, or torch is missing.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    if path.endswith(SAFETENSORS):
        arrays, description = _read_safetensors(path)
        place, other, kind = "", "", RAW
        if which == AVERAGED:
            raise UserError(f"{path} holds one set of weights; omit --weights")
    else:
        content = _load_torch(path)
        place, other, kind = _choose(path, content, which)
        arrays = _to_numpy(path, content[place] if place else content)
        description = content.get(DESCRIPTION) if place else None
    arrays = {key.removeprefix("module."): array for key, array in arrays.items()}
    return StateDict(arrays, place, other, description, kind)


def write(
    path: str, state_dict: Mapping[str, np.ndarray], description: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict: at the top level of a .safetensors file, under "model" in a .pth.

    Args:
      path: the file, which is overwritten; see `create`.
      state_dict: PyTorch's keys to arrays in PyTorch's layout.
      description: plain data that is saved beside them.

    Raises:
      UserError: torch is missing, or the file cannot be written.
    """
    with write_errors_as_user_error(path):
        if path.endswith(SAFETENSORS):
            import safetensors.numpy

            metadata = {"format": "pt"}
            if description is not None:
                metadata[DESCRIPTION] = json.dumps(description)
            arrays = {key: np.asarray(array) for key, array in state_dict.items()}
            Path(path).write_bytes(safetensors.numpy.save(arrays, metadata))
        else:
            torch = _torch()
            content: dict[str, Any] = {
                "model": {k: torch.from_numpy(np.array(a)) for k, a in state_dict.items()}
            }
            if description is not None:
                content[DESCRIPTION] = description
            try:
                with open(path, "wb") as file:
                    torch.save(content, file)
            except RuntimeError as error:  # torch's, for a full disk
                raise UserError(
                    f"{path} cannot be written: {_one_line(error)}; choose another place"
                ) from error


@contextlib.contextmanager
def create(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path`, for a file or folder that is renamed to `path` at the end.

    Remains of an earlier process that was killed are removed first. If the body raises, nothing is left.

    Raises:
      UserError: `path` exists, or cannot be written; at once, before the body runs.
    """
    final = Path(os.path.expanduser(path))
    part = final.with_name(f".part-{final.name}")
    if os.path.lexists(final):
        raise UserError(f"{path} already exists; choose another name")
    with write_errors_as_user_error(path):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        part.touch()
        part.unlink()
    try:
        yield str(part)
        if os.path.lexists(final):
            raise UserError(f"{path} already exists; choose another name")
        with write_errors_as_user_error(path):
            part.rename(final)
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], Any]:
    """Return the arrays and the description; the library checks the header against the file size."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            if not dtypes:
                raise UserError(f"{path} holds no weights: it is empty")
            for key, dtype in dtypes.items():
                if dtype not in (*_FLOATS, *_INTEGERS):
                    raise _unsuitable(path, key, f"{dtype} numbers")
            metadata = file.metadata() or {}
            arrays = {key: _single(file.get_tensor(key)) for key in dtypes}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    return arrays, _parse(path, metadata[DESCRIPTION]) if DESCRIPTION in metadata else None


def _parse(path: str, text: str) -> Any:
    try:
        if len(text) > _LONGEST_DESCRIPTION:
            raise ValueError("it is too long")
        return parse_json(text)
    except ValueError as error:
        raise UserError(
            f"{path}: its metadata {DESCRIPTION!r} is not valid JSON: {_one_line(error)}"
        ) from error


def _choose(path: str, content: Any, which: str | None) -> tuple[str, str, str]:
    """Return the name of the state dict in a .pth, the name of the other one, and the kind of the former."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights: a {type(content).__name__}")
    places = {
        kind: next((name for name in names if isinstance(content.get(name), Mapping)), "")
        for kind, names in _PLACES.items()
    }
    kind = which or (RAW if places[RAW] or not places[AVERAGED] else AVERAGED)
    place, other = places[kind], places[AVERAGED if kind == RAW else RAW]
    if not place and (which == AVERAGED or other):
        held = f"it has {other!r}" if other else "it holds one set of weights"
        raise UserError(f"{path} has no {which} weights ({held}); omit --weights")
    if not (content[place] if place else content):
        raise UserError(f"{path} holds no weights: {_what(content)}")
    return place, other, kind


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading and writing .pth needs torch: {_INSTALL}; or use .safetensors") from error
    return torch


def _load_torch(path: str) -> Any:
    """Load tensors and plain containers.

    torch's own error messages are not repeated: they suggest running the code in the file.
    """
    torch = _torch()
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # of whatever type: the file may hold anything
        raise UserError(f"{path} cannot be read: {_why(error)}") from error


def _check_archive(path: str) -> None:
    """Refuse compressed archives, which may unpack to any size; torch does not compress."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise UserError(
                f"{path} cannot be read: it is a compressed archive or a TorchScript program; save a"
                " state_dict() with torch.save"
            )


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if named := re.search(r"GLOBAL ([\w.]{1,100})", str(error)):
        return f"it holds objects other than weights, which are not loaded: {named[1]}"
    return "it is damaged, or holds something other than PyTorch weights"


def _to_numpy(path: str, state_dict: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Return tensors as arrays; float16 and bfloat16 become float32."""
    torch, size, arrays = _torch(), 0, {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise UserError(f"{path} holds no weights: its keys are not strings, as {str(key)[:50]!r}")
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path} holds something other than weights: {key} is not a tensor")
        if problem := _problem(value):
            raise _unsuitable(path, key, problem)
        size += value.numel() * value.element_size()
    if size > os.path.getsize(path):  # an expanded tensor repeats the numbers in the file
        raise UserError(f"{path} cannot be read: its tensors have {size:,} bytes, more than the file")
    for key, value in state_dict.items():
        value = value.detach()
        arrays[key] = _single((value.float() if value.is_floating_point() else value).numpy())
    return arrays


def _problem(tensor: Any) -> str:
    """Return why a tensor cannot be a weight; "" if it can."""
    if tensor.is_quantized:
        return "quantised numbers"
    if str(tensor.layout) != "torch.strided":
        return "a sparse tensor"
    if tensor.is_meta:
        return "a tensor without numbers (of the meta device)"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
        return f"{str(tensor.dtype).removeprefix('torch.')} numbers"
    return ""


def _unsuitable(path: str, key: str, what: str) -> UserError:
    return UserError(
        f"{path}: {key} holds {what}; save dense tensors of float16, bfloat16, float32 or float64 instead"
    )


def _single(array: np.ndarray) -> np.ndarray:
    """Return floating-point numbers as float32, all others as they are."""
    return array.astype(np.float32, copy=False) if array.dtype.kind in "fV" else array


def _what(content: Mapping[Any, Any]) -> str:
    return f"a mapping with {', '.join(map(str, list(content)[:5])) or 'nothing in it'}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
