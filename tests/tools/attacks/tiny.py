"""A configuration that trains in a second: `tiny.py:KIND`, where KIND is a key of `_MODELS`."""

import ml_collections

from structvit_jax.config import default_config
from structvit_jax.utils.errors import UserError

_MODELS = {
    "images": "deit_tiny_struct_1",
    "clips": "deit_tiny_struct_1_video",
    "digits": "deit_tiny_struct_1_video",
    "structvit": "structvit_tiny_2_1",
}


def get_config(kind: str = "digits") -> ml_collections.ConfigDict:
    if kind not in _MODELS:
        raise UserError(f"unknown kind {kind!r}")
    config = default_config()
    config.model.name = _MODELS[kind]
    config.model.drop_path = 0.1
    config.model.widths = (16,)
    config.data.name = "moving_digits" if kind == "digits" else "folder"
    config.data.frames = 8 if kind in ("clips", "digits") else 0
    config.data.size = 32 if kind == "structvit" else 24
    config.data.batch_size = 4
    config.data.max_unreadable_fraction = 0.5
    config.data.train_examples = 16
    config.data.test_examples = 8
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.eval.batch_size = 8
    config.train.duration = "4 steps"
    config.checkpoint.every = "2 steps"
    if kind == "structvit":
        config.model.widths, config.model.head_width = (8, 8, 16, 16), 8
        config.model.depths = (1, 1, 1, 1)
    return config
