"""Data sets: from files to batches. Nothing here imports jax, so reading data opens no accelerator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from structvit_jax.data.types import Batch, Dataset, Problem, Source

if TYPE_CHECKING:
    from structvit_jax.data.dataset import SOURCES, is_video, load, sources
    from structvit_jax.data.survey import typical

# Imported on first use, because they load decoders, which the types above do not need.
_MODULES = dict.fromkeys(("SOURCES", "is_video", "load", "sources"), "dataset") | {"typical": "survey"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SOURCES",
    "Batch",
    "Dataset",
    "Problem",
    "Source",
    "is_video",
    "load",
    "sources",
    "typical",
]
