"""StructViT on Something-Something V2.

    structvit prepare something_v2 ANNOTATIONS VIDEOS --out=DIR --check
    structvit train --config=something_v2:structvit_s_4_1_video --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: the JSON files and the WebM videos (168,913 for training and 24,777 for testing).
Initial weights: Kinetics-400 weights, as in the paper: a run of configs/kinetics400.py or a released file.
The paper: top-1 with 3 crops 68.8 (structvit_s_4_1_video, 16 frames) and 71.5 (structvit_b_4_1_video, 32
frames).
This configuration has not been trained here.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_s_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
