"""Pure functions on arrays: no weights, no state, jax.numpy only."""

from structvit_jax.ops.depthwise import depthwise_conv
from structvit_jax.ops.structsa import (
    StructAttentionMaps,
    effective_rank,
    struct_attention,
    struct_attention_maps,
)

__all__ = [
    "StructAttentionMaps",
    "depthwise_conv",
    "effective_rank",
    "struct_attention",
    "struct_attention_maps",
]
