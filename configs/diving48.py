"""StructViT on Diving-48 with version 2 of its labels.

    structvit prepare diving48 ANNOTATIONS VIDEOS --out=DIR --check
    structvit train --config=diving48:structvit_b_4_1_video --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: Diving48_V2_train.json, Diving48_V2_test.json, Diving48_vocab.json and the videos (15,027 for training
and 1,970 for testing).
Initial weights: Kinetics-400 weights, as in the paper: a run of configs/kinetics400.py or a released file.
The paper: top-1 88.3 (structvit_b_4_1_video). It does not state the test views; here they are three crops.
This configuration has not been trained here.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_b_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
