"""Files of PyTorch weights: .pth (and .pt, .bin, .tar) through torch, .safetensors without it.

Files are untrusted: code in them is never run, and sizes are checked before memory is allocated.
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
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".tar")
DESCRIPTION = "structvit_jax"  # key beside the weights, see structvit_jax.convert.description
# Names under which the authors' programs save the trained weights and their moving average. Their evaluation
# scripts load the former.
_PLACES = {"raw": ("model", "model_state", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
_MEANING = {"raw": "raw", "ema": "averaged"}
_DTYPES = {"F16", "BF16", "F32", "F64"}  # of safetensors; the others are for counters
_DTYPES |= {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}
_LONGEST_DESCRIPTION = 2**24  # characters


class StateDict(NamedTuple):
    """The weights in a file."""

    arrays: dict[str, np.ndarray]  # PyTorch's keys to arrays in PyTorch's layout; floating point is float32
    place: str = ""  # the name under which the file holds them; "" at the top level
    note: str = ""  # which weights these are, if the file holds raw and averaged ones
    description: Any = None  # plain data beside them, not validated; None if there are none


def is_weights_file(path: str) -> bool:
    """Return whether a path names a file of PyTorch weights, rather than a run or checkpoint."""
    return str(path).endswith(SUFFIXES)


def read(path: str, which: str | None = None) -> StateDict:
    """Read the weights in a file. Only tensors and plain containers are loaded.

    Args:
      path: the file.
      which: "raw" or "ema", for files that hold both; None prefers the raw weights.

    Raises:
      UserError: no such file, a file that is damaged or holds something else, or torch is missing.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    place = note = ""
    if path.endswith(SAFETENSORS):
        if which == "ema":
            raise UserError(f"{path} holds one set of weights; omit --weights")
        arrays, description = _read_safetensors(path)
    else:
        content = _load_torch(path)
        place, note = _choose(path, content, which)
        arrays = _to_numpy(path, content[place] if place else content)
        description = content.get(DESCRIPTION) if place else None
    arrays = {key.removeprefix("module."): array for key, array in arrays.items()}
    return StateDict(arrays, place, note, description)


def write(
    path: str, state_dict: Mapping[str, np.ndarray], description: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict: at the top level of a .safetensors file, under "model" in a .pth.

    Args:
      path: the file, which is overwritten; see `create`.
      state_dict: PyTorch's keys to arrays in PyTorch's layout.
      description: plain data to save beside them.

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
            return
        torch = _torch()
        content: dict[str, Any] = {"model": {k: torch.from_numpy(np.array(a)) for k, a in state_dict.items()}}
        if description is not None:
            content[DESCRIPTION] = description
        try:
            with open(path, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # how torch reports a full disk
            raise UserError(f"{path} cannot be written: {_one_line(error)}; choose another place") from error


@contextlib.contextmanager
def create(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path`, for a file or folder that is renamed to `path` at the end.

    Remains of an earlier process that was killed are removed first. If the body raises, nothing is left.

    Raises:
      UserError: `path` exists, or cannot be written; before the body runs.
    """
    final = Path(os.path.expanduser(path))
    part = final.with_name(f".part-{final.name}")
    _check_absent(final)
    with write_errors_as_user_error(path):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        part.touch()
        part.unlink()
    try:
        yield str(part)
        _check_absent(final)
        with write_errors_as_user_error(path):
            part.rename(final)
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def _check_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} already exists; choose another name")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], Any]:
    """Return the arrays and the description. The library checks the header against the size of the file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            if not dtypes:
                raise UserError(f"{path} holds no weights: it is empty")
            for key, dtype in dtypes.items():
                if dtype not in _DTYPES:
                    raise _unsuitable(path, key, f"{dtype} numbers")
            text = (file.metadata() or {}).get(DESCRIPTION)
            arrays = {key: _as_float32(file.get_tensor(key)) for key in dtypes}
    except UserError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    if text is None:
        return arrays, None
    try:
        if len(text) > _LONGEST_DESCRIPTION:
            raise ValueError("it is too long")
        return arrays, parse_json(text)
    except ValueError as error:
        raise UserError(
            f"{path}: its metadata {DESCRIPTION!r} is not valid JSON: {_one_line(error)}"
        ) from error


def _choose(path: str, content: Any, which: str | None) -> tuple[str, str]:
    """Return the name of the state dict in a .pth, "" for the top level, and a note if there is another."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights: a {type(content).__name__}")
    places = {
        kind: next((name for name in names if isinstance(content.get(name), Mapping)), "")
        for kind, names in _PLACES.items()
    }
    kind = which or ("raw" if places["raw"] or not places["ema"] else "ema")
    other_kind = "ema" if kind == "raw" else "raw"
    place, other = places[kind], places[other_kind]
    if not place and (which == "ema" or other):
        held = f"it has {other!r}" if other else "it holds one set of weights"
        raise UserError(f"{path} has no {which} weights ({held}); omit --weights")
    if not (content[place] if place else content):
        keys = ", ".join(map(str, list(content)[:5])) or "nothing in it"
        raise UserError(f"{path} holds no weights: a mapping with {keys}")
    note = (
        f"weights: {place!r}, the {_MEANING[kind]} ones; the file also holds {other!r}, the"
        f" {_MEANING[other_kind]} ones, which structvit convert takes with --weights={other_kind}"
    )
    return place, note if other else ""


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "reading and writing .pth needs torch: pip install 'structvit_jax[torch]'; or use .safetensors"
        ) from error
    return torch


def _load_torch(path: str) -> Any:
    """Load tensors and plain containers.

    torch's own error messages are not repeated, because they suggest running the code in the file.
    """
    torch = _torch()
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of any type
        reason = "it is damaged, or holds something other than PyTorch weights"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif named := re.search(r"GLOBAL ([\w.]{1,100})", str(error)):
            reason = f"it holds objects other than weights, which are not loaded: {named[1]}"
        raise UserError(f"{path} cannot be read: {reason}") from error


def _check_archive(path: str) -> None:
    """Refuse compressed archives, which may unpack to any size; torch does not compress."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise UserError(
                f"{path} cannot be read: it is a compressed archive or a TorchScript program; save a"
                " state_dict() with torch.save"
            )


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
        arrays[key] = _as_float32((value.float() if value.is_floating_point() else value).numpy())
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


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Return floating-point numbers (V is bfloat16) as float32, all others as they are."""
    return array.astype(np.float32, copy=False) if array.dtype.kind in "fV" else array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
