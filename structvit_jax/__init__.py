"""StructViT (CVPR 2024) in JAX: vision transformers whose attention reads the structure of correlations."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["StructAttention", "convert", "cost", "create_model", "list_models", "load_trained", "ops"]

# Loaded on first use: processes that only read data load no models.
_ROOMS = dict.fromkeys(("StructAttention", "cost", "create_model", "list_models"), "models")
_ROOMS["load_trained"] = "trained"

if sys.argv[:1] == ["-m"]:  # `python -m structvit_jax.COMMAND`, whose imports take seconds
    from structvit_jax import signals

    signals.prepare_command(trains=any(word.endswith("structvit_jax.main") for word in sys.orig_argv))


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"structvit_jax.{_ROOMS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"structvit_jax.{name}")
    raise AttributeError(f"module 'structvit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
