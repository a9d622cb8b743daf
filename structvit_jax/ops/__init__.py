"""Pure functions on arrays: no weights, no state, jax.numpy only."""

from structvit_jax.ops.depthwise import depthwise_conv
from structvit_jax.ops.devices import batch_split_over, portable_lowering
from structvit_jax.ops.feed_forward import gelu, mlp
from structvit_jax.ops.patches import convolve
from structvit_jax.ops.structsa import (
    StructAttentionMaps,
    convolve_patterns,
    effective_rank,
    struct_attention,
    struct_attention_maps,
)

__all__ = [
    "StructAttentionMaps",
    "batch_split_over",
    "convolve",
    "convolve_patterns",
    "depthwise_conv",
    "effective_rank",
    "gelu",
    "mlp",
    "portable_lowering",
    "struct_attention",
    "struct_attention_maps",
]
