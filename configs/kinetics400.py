"""StructViT on Kinetics-400.

    structvit prepare kinetics400 ANNOTATIONS VIDEOS --out=DIR --check
    structvit train --config=kinetics400:structvit_s_4_1_video --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: the official CSV files and the trimmed videos (240,436 for training and 19,796 for testing in
mmaction2's copy).
Initial weights: ImageNet weights, inflated in time as in the paper: a run of configs/imagenet.py, or a file
that UniFormer released.
The paper: top-1 with 4 clips 81.4 (structvit_s_4_1_video, 16 frames) and 83.3 (structvit_b_4_1_video, 32
frames).
This configuration has not been trained here.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_s_4_1_video") -> ml_collections.ConfigDict:
    return recipes.dense_video(model)
