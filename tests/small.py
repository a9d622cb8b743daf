"""Small models and short runs that several tests share."""

import jax

from structvit_jax import create_model
from structvit_jax.config import Durations, default_config
from structvit_jax.models import weights
from structvit_jax.runtime import mesh
from structvit_jax.training import optim
from structvit_jax.training.step import init_state, make_train_step

SHORT = [
    "--config.data.batch_size=8",
    "--config.data.train_examples=40",
    "--config.data.test_examples=16",
    "--config.eval.batch_size=16",
    "--config.eval.every=",
    "--config.train.duration=2 steps",
    "--config.train.grad_accum_steps=1",
    "--config.optimizer.warmup=0 steps",
]
SMALL = [  # a structvit_tiny that compiles in seconds
    "--config.model.depths=(1,1,1,1)",
    "--config.model.widths=(8,8,16,16)",
    "--config.model.head_width=8",
]


def small_config(**model):
    config = default_config()
    config.model.name = "structvit_tiny_2_1"
    config.model.widths, config.model.head_width, config.model.depths = (8, 16, 64, 64), 8, (1, 1, 1, 1)
    config.model.drop_path = 0.2
    config.data.name, config.data.frames, config.data.size = "digits", 0, 32
    config.data.batch_size = 16
    config.optimizer.lr = 3e-3
    config.train.label_smoothing = 0.1
    config.optimizer.clip_norm = 1.0
    config.model.update(model)
    return config


def setup(config, data_axis, fsdp):
    grid = mesh.make_mesh(data_axis, fsdp, jax.devices()[: data_axis * fsdp])
    model = create_model(num_classes=10, **{k: v for k, v in config.model.items() if v is not None})
    schedule = optim.learning_rate(config.optimizer, Durations(20))
    params = weights.split(model)[1].params
    optimizer = optim.make_optimizer(config.optimizer, params, model.variant.depths)
    averaged = config.optimizer.ema > 0
    state = init_state(weights.split(model)[1], optimizer, grid, averaged=averaged)
    return grid, model, state, make_train_step(model, optimizer, schedule, config, grid, state)
