"""The operations of StructViT as pure functions on arrays: definitions in plain JAX, one module each.

On CPUs, GPUs and TPUs faster kernels replace the definitions, see `structvit_jax.ops.kernels`.
"""

from structvit_jax.ops.convolution import convolve
from structvit_jax.ops.depthwise import depthwise_conv
from structvit_jax.ops.dispatch import use_kernels
from structvit_jax.ops.feed_forward import gelu, linear, mlp
from structvit_jax.ops.normalization import layer_norm
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
