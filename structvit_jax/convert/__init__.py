"""Convert weights: read the released PyTorch files, recognise their model, and fit them to another.

`structvit convert SOURCE DESTINATION` does this for files; `config.init_from` takes them too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from structvit_jax.convert.adapt import NOISE, Adapted, Rules, adapt
from structvit_jax.convert.description import Description, Inputs
from structvit_jax.convert.files import is_weights_file
from structvit_jax.convert.names import from_torch, to_torch, torch_key
from structvit_jax.convert.source import RELEASED, Source, read_released, recognise
from structvit_jax.models import Network
from structvit_jax.models.weights import cast_like, split, update

Model = TypeVar("Model", bound=Network)


def load_uniformer(
    model: Model,
    state_dict: Mapping[str, np.ndarray],
    *,
    inflate: str = "average",
    noise: float = NOISE,
    seed: int = 0,
) -> Model:
    """Copy a PyTorch UniFormer's weights into `model` and return it.

    The model shares no memory with `state_dict`. A StructViT computes what the UniFormer does, to rounding,
    at stride 1: its kernels start as plain attention. Image weights are inflated for a video model, whose
    logits then are not theirs.

    Args:
      model: a UniFormer or StructViT of the weights' size.
      state_dict: PyTorch's keys to NumPy arrays in PyTorch's layout.
      inflate: "average" or "centre", see `structvit_jax.convert.adapt.inflate`.
      noise: deviation of what sets the value kernels of the D patterns apart; without it they stay equal.
      seed: of the noise.

    Raises:
      UserError: naming every missing, extra and misshapen array at once; the model is unchanged then.
    """
    arrays = from_torch(state_dict)
    position = arrays.get("blocks1.0.pos_embed.kernel")
    video = position is not None and position.ndim == 5
    theirs = dataclasses.replace(model.variant, structure_dim=0, stride=1, video=video)
    classes = arrays["head.bias"].size if "head.bias" in arrays else 0
    source = Source(arrays, theirs, {"name": "UniFormer"}, classes, None, None, "the state dict")
    own = split(model)[1]
    rules = Rules(inflate=inflate, noise=noise, seed=seed)
    adapted = adapt(source, own.params | own.batch_stats, model.variant, None, rules, strict=True)
    for note in adapted.notes:
        warnings.warn(note, stacklevel=2)
    update(model, cast_like(own, adapted.arrays))
    return model


__all__ = [
    "NOISE",
    "RELEASED",
    "Adapted",
    "Description",
    "Inputs",
    "Rules",
    "Source",
    "adapt",
    "from_torch",
    "is_weights_file",
    "load_uniformer",
    "read_released",
    "recognise",
    "to_torch",
    "torch_key",
]
