"""Models with weights, as Flax NNX modules. They call the operations of `structvit_jax.ops`."""

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
