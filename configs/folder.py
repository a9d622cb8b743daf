"""Your own videos: a small StructViT that a CPU can train.

    python -m structvit_jax.main --config=configs/folder.py --config.data.root=DIR

DIR/train/CLASS/FILE and DIR/val/CLASS/FILE, or lists DIR/train.csv and DIR/val.csv (path,label[,start,end]);
see the README. An argument names another model, also one for images: configs/folder.py:structvit_tiny_4_1.
Flipping is off, since left and right may be classes; where they are not, try --config.augment.flip=0.5.
"""

import ml_collections

from structvit_jax.config import default_config


def get_config(model: str = "structvit_tiny_4_1_video") -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = model

    config.data.name = "folder"
    config.data.frames = 8 if model.endswith("_video") else 0
    config.data.sampling = "segment"  # over the whole clip, however long
    config.data.size = 64 if "tiny" in model else 224
    config.data.short_side = 256 if config.data.frames else 0
    config.data.batch_size = 16
    config.data.mean = (0.45, 0.45, 0.45)
    config.data.std = (0.225, 0.225, 0.225)
    config.augment.crop_area = (0.5, 1.0)
    config.augment.crop_aspect = (0.75, 1.3333)

    config.train.duration = "30 epochs"
    config.train.label_smoothing = 0.1
    config.optimizer.lr = 1e-3
    config.optimizer.warmup = "2 epochs"
    config.eval.every = "5 epochs"
    config.eval.batch_size = 32
    config.checkpoint.every = "1 epochs"
    return config
