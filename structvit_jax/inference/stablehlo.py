"""Export a trained model as a standalone StableHLO program; see `structvit export`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import structvit_jax
from structvit_jax.config import INPUTS
from structvit_jax.inference.trained import TrainedModel
from structvit_jax.ops import use_kernels
from structvit_jax.runtime import storage
from structvit_jax.utils.errors import check_choice
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_USUAL = ("cpu", "cuda", "tpu")
_INSTALL = "pip install jax flatbuffers"  # with JAX's extra for the accelerator, such as jax[cuda13]
_SAMPLING = ("frames", "stride", "sampling", "size", "crop_fraction", "test_clips", "test_crops")


def export(trained: TrainedModel, platforms: Sequence[str] = _USUAL) -> jax.export.Exported:
    """Return a program that maps pixels to logits.

    Its input is uint8 [batch, [time,] height, width, 3], which it normalises. Its output is float32 [batch,
    classes]. The program is slower than the model in this package, because it uses plain JAX operations: the
    fast kernels are not available where it is loaded.

    Raises:
      UserError: a platform is unknown.
    """
    for platform in platforms:
        check_choice("platform", platform, PLATFORMS)

    def logits(pixels: jax.Array) -> jax.Array:
        return trained.network(trained.normalized(pixels[None]))[0].astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("batch")
    example = jax.ShapeDtypeStruct((batch, *trained.reader.shape), jnp.uint8)
    with use_kernels("portable"):
        return jax.export.export(jax.jit(jax.vmap(logits)), platforms=platforms)(example)


def card(trained: TrainedModel, program: jax.export.Exported, content: bytes) -> dict[str, Any]:
    """Return the card of a program, which describes how to run it, its inputs, its outputs and its origin."""
    data = trained.config.data
    axes = ["batch", *["time"] * (data.frames > 0), "height", "width", "channels"]
    return {
        "model": trained.config.model.name,
        "install": _INSTALL,
        "checkpoint": trained.where,
        "input": {
            "type": "uint8",
            "axes": axes,
            "shape": [None, *trained.reader.shape],
            "channels": data.channels or INPUTS["channels"],
            "normalised": "inside the program",
            "sampling": {key: data[key] for key in _SAMPLING},
        },
        "output": {"type": "float32", "axes": ["batch", "class"], "is": "logits"},
        "class_names": list(trained.class_names),
        "platforms": list(program.platforms),
        "calling_convention": program.calling_convention_version,
        "versions": {"jax": jax.__version__, "structvit_jax": structvit_jax.__version__},
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def check_output(path: str) -> None:
    """Raise UserError if the path of a program exists and is not a regular file."""
    storage.check_replaceable(parse_path(path))


def write(trained: TrainedModel, path: str, platforms: Sequence[str] = _USUAL) -> str:
    """Write a program and its description (PATH.json); return a line that describes them.

    Raises:
      UserError: a platform is unknown, or the path cannot be written.
    """
    file, program = parse_path(path), export(trained, platforms)
    content = bytes(program.serialize())
    with write_errors_as_user_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write(file, content)
        storage.write_json(file.with_name(file.name + ".json"), card(trained, program, content))
    return f"{file}: {len(content):,} bytes for {', '.join(program.platforms)}; described in {file.name}.json"
