"""Networks that hold weights (Flax NNX) on top of the operations."""

from structvit_jax.models.networks import Network, create_model
from structvit_jax.models.struct_attention import StructAttention
from structvit_jax.models.variants import Variant, get_variant, list_models

__all__ = [
    "Network",
    "StructAttention",
    "Variant",
    "create_model",
    "get_variant",
    "list_models",
]
