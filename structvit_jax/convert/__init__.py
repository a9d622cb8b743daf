"""Convert weights: read the released PyTorch files, recognise their model, and fit them to another model.

`structvit convert SOURCE DESTINATION` converts files and checkpoints; `config.init_from` starts a run from
a file or checkpoint.
"""

from structvit_jax.convert.adapt import Action, Rules, adapt, load_uniformer
from structvit_jax.convert.array_names import from_torch, to_torch
from structvit_jax.convert.description import Description, Inputs
from structvit_jax.convert.source import RELEASED, Source, read_released
from structvit_jax.convert.weight_files import is_weights_file

__all__ = [
    "RELEASED",
    "Action",
    "Description",
    "Inputs",
    "Rules",
    "Source",
    "adapt",
    "from_torch",
    "is_weights_file",
    "load_uniformer",
    "read_released",
    "to_torch",
]
