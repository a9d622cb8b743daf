"""Fill a model with the weights of a PyTorch UniFormer that are already in memory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from structvit_jax.convert.adapt import NOISE, Rules, adapt
from structvit_jax.convert.array_names import from_torch
from structvit_jax.convert.source import Source
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
    """Copy the weights of a PyTorch UniFormer into `model` and return it.

    A StructViT with stride 1 then computes what the UniFormer does, to rounding: its kernels start as plain
    attention. Image weights are inflated for a video model, which changes the logits.

    Args:
      model: a UniFormer or StructViT of the same size.
      state_dict: PyTorch's keys to NumPy arrays in PyTorch's layout; they are copied.
      inflate: "average" or "centre", see `structvit_jax.convert.adapt.inflate`.
      noise: deviation that sets the value kernels of the D structure kernels apart; with 0 they stay equal.
      seed: of the noise.

    Raises:
      UserError: naming every missing, extra and misshapen array at once; the model is unchanged then.
    """
    arrays = from_torch(state_dict)
    position = arrays.get("blocks1.0.pos_embed.kernel")
    video = position is not None and position.ndim == 5
    source = Source(
        arrays,
        variant=dataclasses.replace(model.variant, structure_dim=0, stride=1, video=video),
        model={"name": "UniFormer"},
        num_classes=arrays["head.bias"].size if "head.bias" in arrays else 0,
        class_names=None,
        inputs=None,
        where="the state dict",
    )
    own = split(model)[1]
    rules = Rules(inflate=inflate, noise=noise, seed=seed)
    adapted = adapt(source, own.params | own.batch_stats, model.variant, None, rules, strict=True)
    for note in adapted.notes:
        warnings.warn(note, stacklevel=2)
    update(model, cast_like(own, adapted.arrays))
    return model
