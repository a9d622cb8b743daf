"""StructViT on Kinetics-400.

    structvit prepare kinetics400 ANNOTATIONS VIDEOS --out DIR --check
    python -m structvit_jax.main --config=configs/kinetics400.py:structvit_s_4_1_video --config.data.root=DIR

Needs the official csv files and the trimmed videos (mmaction2's copy has 240,436 and 19,796).
The paper's top-1 with 4 clips: 81.4 (structvit_s_4_1_video, 16 frames) and 83.3
(structvit_b_4_1_video, 32 frames).
Not run here. Starts from ImageNet weights inflated in time, as the paper: --config.init_from=RUN_OR_FILE, a
run of configs/imagenet.py or UniFormer's released file.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_s_4_1_video") -> ml_collections.ConfigDict:
    return recipes.dense_video(model)
