"""What a model's attention reads: its maps as numbers, as a picture, and as a page to point at."""

from structvit_jax.analysis.explain.maps import Layer, Query, layers, query_maps

__all__ = ["Layer", "Query", "layers", "query_maps"]
