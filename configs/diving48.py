"""StructViT on Diving-48, V2 of its labels.

    structvit prepare diving48 ANNOTATIONS VIDEOS --out DIR --check
    python -m structvit_jax.main --config=configs/diving48.py:structvit_b_4_1_video --config.data.root=DIR

Needs Diving48_V2_train.json, Diving48_V2_test.json, Diving48_vocab.json and the videos (15,027 and 1,970).
The paper's top-1: 88.3 (structvit_b_4_1_video); its test views are not stated, 3 crops here.
Not run here. Starts from Kinetics-400 weights, as the paper: --config.init_from=RUN_OR_FILE.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_b_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
