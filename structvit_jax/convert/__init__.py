"""Convert weights: read the released PyTorch files, recognise their model, and fit them to another.

`structvit convert SOURCE DESTINATION` does this for files, and `config.init_from` for a run.
"""

from structvit_jax.convert.adapt import NOISE, Action, Adapted, Outcome, Rules, adapt
from structvit_jax.convert.array_names import from_torch, to_torch
from structvit_jax.convert.description import Description, Inputs
from structvit_jax.convert.source import RELEASED, Source, read_released, recognise
from structvit_jax.convert.uniformer import load_uniformer
from structvit_jax.convert.weight_files import is_weights_file

__all__ = [
    "NOISE",
    "RELEASED",
    "Action",
    "Adapted",
    "Description",
    "Inputs",
    "Outcome",
    "Rules",
    "Source",
    "adapt",
    "from_torch",
    "is_weights_file",
    "load_uniformer",
    "read_released",
    "recognise",
    "to_torch",
]
