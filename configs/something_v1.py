"""StructViT on Something-Something V1.

    structvit prepare something_v1 ANNOTATIONS FRAMES --out=DIR --check
    structvit train --config=something_v1:structvit_s_4_1_video --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: the CSV files and the folders of frames (86,017 for training and 11,522 for testing).
Initial weights: Kinetics-400 weights, as in the paper: a run of configs/kinetics400.py or a released file.
The paper: top-1 with 3 crops 58.0 (structvit_s_4_1_video, 16 frames) and 61.3 (structvit_b_4_1_video, 32
frames).
This configuration has not been trained here.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_s_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
