"""Pure functions on arrays: no weights, no state, jax.numpy only."""

from structvit_jax.ops.depthwise import depthwise_conv
from structvit_jax.ops.structsa import StructAttentionMaps, struct_attention, struct_attention_maps

__all__ = ["StructAttentionMaps", "depthwise_conv", "struct_attention", "struct_attention_maps"]
