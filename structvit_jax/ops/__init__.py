"""The operations of StructViT as pure functions on arrays, defined in plain JAX.

On CPUs, GPUs and TPUs, faster kernels replace these definitions (see `structvit_jax.ops.kernels`).
"""

from structvit_jax.ops.convolution import convolve, depthwise_conv
from structvit_jax.ops.dispatch import use_kernels
from structvit_jax.ops.pointwise import gelu, layer_norm, linear, mlp
from structvit_jax.ops.structsa import (
    StructAttentionMaps,
    convolve_structure,
    effective_rank,
    struct_attention,
    struct_attention_maps,
)

__all__ = [
    "StructAttentionMaps",
    "convolve",
    "convolve_structure",
    "depthwise_conv",
    "effective_rank",
    "gelu",
    "layer_norm",
    "linear",
    "mlp",
    "struct_attention",
    "struct_attention_maps",
    "use_kernels",
]
