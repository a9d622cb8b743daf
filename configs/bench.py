"""A model at its size on random pictures, to see how fast it is: no data are needed.

    python -m structvit_jax.main --config=configs/bench.py:structvit_s_4_1 --mode=bench --peer=torch
    python -m structvit_jax.main --config=configs/bench.py:structvit_s_4_1_video --mode=bench \
        --config.data.batch_size=1

The argument is the model: images of 224, eight at a time, or one clip of 16 frames; no augmentation.
For half precision --config.model.dtype=bfloat16, and then larger batches; for other sizes
--config.data.size and --config.data.frames. What is timed: --config.bench.only=model, or parts.
"""

import ml_collections

from structvit_jax.config import default_config


def get_config(argument: str = "structvit_s_4_1") -> ml_collections.ConfigDict:
    config = default_config()
    video = argument.endswith("_video")
    config.model.name = argument
    config.data.name = "noise:400" if video else "noise:1000"
    config.data.size = 224
    config.data.frames = 16 if video else 0
    config.data.batch_size = config.eval.batch_size = 1 if video else 8
    config.data.train_examples = config.data.test_examples = 64
    return config
