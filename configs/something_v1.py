"""StructViT on Something-Something V1.

    structvit prepare something_v1 ANNOTATIONS FRAMES --out DIR --check
    python -m structvit_jax.main --config=configs/something_v1.py:structvit_s_4_1_video --config.data.root=DIR

Needs the csv files and the folders of frames (86,017 and 11,522).
The paper's top-1 with 3 crops: 58.0 (structvit_s_4_1_video, 16 frames) and 61.3
(structvit_b_4_1_video, 32 frames).
Not run here. Starts from Kinetics-400 weights, as the paper: --config.init_from=RUN_OR_FILE.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_s_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
