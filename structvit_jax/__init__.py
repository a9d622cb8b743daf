"""StructViT (CVPR 2024) in JAX: vision transformers whose attention reads the structure of correlations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, editors and the API reference
    from structvit_jax import convert, ops
    from structvit_jax.inference.trained import load_trained
    from structvit_jax.models import StructAttention, create_model, list_models
    from structvit_jax.performance.cost import cost

__version__ = "0.1.0"
__all__ = ["StructAttention", "convert", "cost", "create_model", "list_models", "load_trained", "ops"]

# Loaded on first use: processes that only read data load no models.
_MODULES = dict.fromkeys(("StructAttention", "create_model", "list_models"), "models")
_MODULES["cost"] = "performance.cost"
_MODULES["load_trained"] = "inference.trained"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"structvit_jax.{_MODULES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"structvit_jax.{name}")
    raise AttributeError(f"module 'structvit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
