"""Read and write files of PyTorch weights: .pth, .pt, .bin and .tar with torch, .safetensors without it.

Files are not trusted: code in them is never run, and sizes are checked before memory is allocated.
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

from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import parse_json
from structvit_jax.utils.paths import write_errors_as_user_error

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".tar")
DESCRIPTION = "structvit_jax"  # key of the description in a file, see structvit_jax.convert.description
# Keys under which UniFormer's programs save the trained weights (raw) and their moving average (ema). Its
# evaluation scripts load the raw weights.
_KEYS = {"raw": ("model", "model_state", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
_MEANING = {"raw": "raw", "ema": "averaged"}
_DTYPES = {"F16", "BF16", "F32", "F64"}  # floating-point types of safetensors
# Types of counters.
_DTYPES |= {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}
_LONGEST_DESCRIPTION = 2**24  # characters


class StateDict(NamedTuple):
    """The weights in a file."""

    arrays: dict[str, np.ndarray]  # PyTorch's keys to arrays in PyTorch's layout; floating point is float32
    key: str = ""  # the key of the state dict in the file; "" if it is at the top level
    note: str = ""  # says which weights these are, if the file holds both raw and averaged ones
    description: Any = None  # plain data that was saved with them, not validated; None if there is none


def is_weights_file(path: str) -> bool:
    """Return whether a path is that of a file of PyTorch weights, and not of a run or checkpoint."""
    return str(path).endswith(SUFFIXES)


def read(path: str, which: str | None = None) -> StateDict:
    """Read the weights in a file. Only tensors and plain containers are loaded.

    Args:
      path: the file.
      which: "raw" or "ema", for files that hold both; None prefers the raw weights.

    Raises:
      UserError: the file does not exist, is damaged or holds something else, or torch is not installed.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    key = note = ""
    if path.endswith(SAFETENSORS):
        if which == "ema":
            raise UserError(f"{path} holds one set of weights; omit --weights")
        arrays, description = _read_safetensors(path)
    else:
        content = _load_torch(path)
        key, note = _choose(path, content, which)
        arrays = _to_numpy(path, content[key] if key else content)
        description = content.get(DESCRIPTION) if key else None
    arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return StateDict(arrays, key, note, description)


def write(
    path: str, state_dict: Mapping[str, np.ndarray], description: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict to the top level of a .safetensors file, or under the key "model" of a .pth file.

    Args:
      path: the file; an existing file is overwritten, see `create`.
      state_dict: maps PyTorch's keys to arrays in PyTorch's layout.
      description: plain data to save with them.

    Raises:
      UserError: torch is not installed, or the file cannot be written.
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
        except RuntimeError as error:  # torch raises this if the disk is full
            raise UserError(f"{path} cannot be written: {_one_line(error)}; choose another path") from error


@contextlib.contextmanager
def create(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path`, for a file or folder that is renamed to `path` at the end.

    Temporary files of an earlier process that was killed are removed first. If the body of the context
    raises, nothing is left.

    Raises:
      UserError: `path` exists, or cannot be written. This is checked before the body runs, and again after
        it.
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
    """Return the arrays and the description.

    The safetensors library checks the sizes in the header against the size of the file.
    """
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
    """Choose the state dict in a .pth file.

    Return its key ("" for the top level), and a note if the file holds another state dict.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights: a {type(content).__name__}")
    keys = {
        kind: next((name for name in names if isinstance(content.get(name), Mapping)), "")
        for kind, names in _KEYS.items()
    }
    kind = which or ("raw" if keys["raw"] or not keys["ema"] else "ema")
    other_kind = "ema" if kind == "raw" else "raw"
    key, other = keys[kind], keys[other_kind]
    if not key and (which == "ema" or other):
        held = f"it holds {other!r}" if other else "it holds one set of weights"
        raise UserError(f"{path} has no {which} weights ({held}); omit --weights")
    if not (content[key] if key else content):
        found = f"with the keys {', '.join(map(str, list(content)[:5]))}" if content else "that is empty"
        raise UserError(f"{path} holds no weights: a mapping {found}")
    note = (
        f"weights: {key!r} ({_MEANING[kind]}); the file also holds {other!r} ({_MEANING[other_kind]}), which"
        f" structvit convert reads with --weights={other_kind}"
    )
    return key, note if other else ""


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "reading and writing .pth needs torch: pip install 'structvit_jax[torch]'; or use .safetensors"
        ) from error
    return torch


def _load_torch(path: str) -> Any:
    """Load a file in which only tensors and plain containers are allowed.

    The error messages of torch are not shown, because they suggest running the code in the file.
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
    """Raise UserError for a compressed archive, which may unpack to any size; torch does not compress."""
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
            raise UserError(f"{path} holds no weights: its keys are not strings, such as {str(key)[:50]!r}")
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path} holds something other than weights: {key} is not a tensor")
        if problem := _problem(value):
            raise _unsuitable(path, key, problem)
        size += value.numel() * value.element_size()
    if size > os.path.getsize(path):  # an expanded tensor repeats numbers of the file
        raise UserError(f"{path} cannot be read: its tensors have {size:,} bytes, more than the file")
    for key, value in state_dict.items():
        value = value.detach()
        arrays[key] = _as_float32((value.float() if value.is_floating_point() else value).numpy())
    return arrays


def _problem(tensor: Any) -> str:
    """Describe a tensor that cannot be a weight; return "" if it can be one."""
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
    """Convert floating-point arrays to float32 ("V" is the kind of bfloat16); return others unchanged."""
    return array.astype(np.float32, copy=False) if array.dtype.kind in "fV" else array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
