"""Explain what a model's attention reads: maps as arrays, as a picture, and as an interactive page."""

from structvit_jax.analysis.explain.maps import Layer, Query, layers, query_maps

__all__ = ["Layer", "Query", "layers", "query_maps"]
