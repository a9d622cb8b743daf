"""Export a trained model as a program of its own: it runs wherever JAX does, without this package.

    python -m structvit_jax.export --checkpoint=RUN OUT.jax [--platforms=cpu,cuda,tpu]

Writes OUT.jax, a program serialised by `jax.export` with the weights inside, and OUT.jax.json, its card: what
to install, what the program takes and returns, the names of its classes, and where it comes from. In an
environment with JAX and flatbuffers, which JAX needs to load programs and does not install by itself:

    program = jax.export.deserialize(open("OUT.jax", "rb").read())
    logits = program.call(pixels)  # uint8 [batch, [time,] height, width, 3] -> float32 [batch, classes]

It takes any number of examples. JAX promises to run programs that were exported by versions up to six
months older than it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import structvit_jax
from structvit_jax.command import checkpoint_and_paths, run_command
from structvit_jax.config import INPUTS
from structvit_jax.errors import UserError, known
from structvit_jax.ops import running_anywhere
from structvit_jax.paths import parse_path, writing
from structvit_jax.trained import Trained, load_trained
from structvit_jax.training.storage import check_replaceable, write, write_json

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_USUAL = ("cpu", "cuda", "tpu")
_INSTALL = "pip install jax flatbuffers"  # with JAX's extra for the accelerator, such as jax[cuda13]
_PLATFORMS = flags.DEFINE_list("platforms", list(_USUAL), "What the program runs on.")
_SAMPLING = ("frames", "stride", "sampling", "size", "crop_fraction", "test_clips", "test_crops")


def export(trained: Trained, platforms: Sequence[str] = _USUAL) -> jax.export.Exported:
    """The program: uint8 [batch, [time,] height, width, 3] -> logits, float32 [batch, classes].

    Pixels are normalised inside. Operations take forms in JAX that run anywhere, slower than those of the
    framework: the C++ of CPUs and the kernels of TPUs are not there where the program is loaded.

    Raises:
      UserError: an unknown platform.
    """
    for platform in platforms:
        known("platform", platform, PLATFORMS)

    def logits(pixels):
        return trained.network(trained.normalized(pixels[None]))[0].astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("batch")
    example = jax.ShapeDtypeStruct((batch, *trained.reader.shape), jnp.uint8)
    with running_anywhere():
        return jax.export.export(jax.jit(jax.vmap(logits)), platforms=platforms)(example)


def card(trained: Trained, program: jax.export.Exported, content: bytes) -> dict[str, Any]:
    """Return the card of a program: how to run it, and where it comes from."""
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


def main(argv: list[str]) -> None:
    checkpoint, config, paths = checkpoint_and_paths(argv, "OUT.jax")
    if len(paths) > 1:
        raise UserError(f"it writes one file; {', '.join(paths)} are {len(paths)}")
    path = parse_path(paths[0])
    check_replaceable(path)
    trained = load_trained(checkpoint, config)
    program = export(trained, _PLATFORMS.value)
    content = bytes(program.serialize())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)
        write_json(path.with_name(path.name + ".json"), card(trained, program, content))
    print(f"{path}: {len(content):,} bytes for {', '.join(program.platforms)}; its card is {path.name}.json")


if __name__ == "__main__":
    run_command(main)
