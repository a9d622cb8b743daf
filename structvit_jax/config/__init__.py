"""Every key of a configuration, once, with its meaning; files in `configs/` change values only."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from structvit_jax.models.variants import OVERRIDES, Variant
from structvit_jax.utils.errors import UserError


def default_config() -> ml_collections.ConfigDict:
    """The defaults, locked: a key that is not here is an error.

    Durations are "N steps", "N epochs" or "N examples"; fractions are allowed.
    """
    config = ml_collections.ConfigDict()
    # Weights to start from: RUN or RUN/checkpoints/STEP of ours, or a released .pth or .safetensors file.
    config.init_from = ""  # "" starts from scratch
    config.init = _init()
    config.model = _model()
    config.data = _data()
    config.augment = _augment()
    config.train = _train()
    config.optimizer = _optimizer()
    config.eval = _eval()
    config.checkpoint = _checkpoint()
    config.mesh = _mesh()
    return config.lock()


def _init() -> ml_collections.ConfigDict:
    """How weights of config.init_from are fitted to the model."""
    init = ml_collections.ConfigDict()
    init.inflate = "average"  # over time, of image weights: "average" (UniFormer's) or "centre"
    init.kernels = "delta"  # of StructSA, from plain attention: "delta" keeps the function, or "fresh"
    init.noise = 0.1  # that tells equal patterns apart and leaves their sum; 0 leaves them equal
    return init


def _model() -> ml_collections.ConfigDict:
    """The model: a name, and any field of its variant."""
    model = ml_collections.ConfigDict()
    model.name = "structvit_tiny_4_1_video"  # see structvit_jax.list_models
    for key, kind in _override_types().items():  # None keeps the named model's own value
        model[key] = config_dict.placeholder(kind)
    return model


def _data() -> ml_collections.ConfigDict:
    """What is read, and how."""
    data = ml_collections.ConfigDict()
    data.name = "moving_digits"  # see structvit_jax.data.SOURCES
    data.root = ""  # of "folder": where the splits are
    data.train_split = "train"  # a folder of class folders, or a list, below the root
    data.test_split = "val"  # of moving digits "tune" is clips of training scans, to choose settings on
    data.val_fraction = (
        0.0  # of a folder's training examples, held out where it has no test split; 0: an error
    )
    data.batch_size = 64  # clips or images per step, over all devices, repeats included
    data.train_examples = 0  # for data made on the fly: how many examples an epoch has
    data.test_examples = 0  # the same for the test split
    # None follows the weights that the run starts from, without any INPUTS.
    data.mean = config_dict.placeholder(tuple)  # subtracted from channels scaled to 0..1
    data.std = config_dict.placeholder(tuple)  # then divided by
    data.channels = config_dict.placeholder(str)  # "rgb" or "bgr"
    data.frames = 8  # of a clip; 0 means images
    data.stride = 1  # a clip spans frames x stride frames of its video
    data.sampling = "dense"  # "dense", "strided" or "segment": see structvit_jax.data.sampling
    data.size = 24  # height and width that the model sees
    data.short_side = 0  # scale larger frames to this while decoding; 0 keeps their size
    data.crop_fraction = 1.0  # in testing, of the short side that the crop takes
    data.test_clips = 1  # views of a test example: clips x crops, their scores averaged
    data.test_crops = 1  # 1 is the middle; 3 are left, middle and right
    data.label_maps = ""  # a folder of them, for token labelling: see structvit prepare label_maps
    data.workers = 0  # processes that decode; 0 reads in threads
    data.max_pixels = 2**26  # of a picture or video frame (width x height); larger ones are not decoded
    data.max_frames = 2**20  # of a video or folder of frames; longer ones are not read
    data.max_replaced_frames = 0.0  # fraction of a clip's frames that may be replaced by their neighbours
    data.max_unreadable_fraction = (
        0.05  # of the training examples that may turn out unreadable before the run stops
    )
    return data


def _augment() -> ml_collections.ConfigDict:
    """Augmentation of training examples; all off by default."""
    augment = ml_collections.ConfigDict()
    augment.crop_area = (1.0, 1.0)  # random crops: their share of the frame, drawn uniformly
    augment.crop_aspect = (1.0, 1.0)  # ... and their width by height, log-uniformly
    augment.flip = 0.0  # probability of mirroring
    augment.color_jitter = 0.0  # brightness, contrast and saturation, each by a factor within 1 +- this
    augment.randaugment = ""  # a policy such as "rand-m7-n4-mstd0.5-inc1"
    augment.repeated_augmentation = 1  # copies of every example in a batch, augmented each in its own way
    augment.erase = 0.0  # probability of random erasing
    augment.mixup = 0.0  # alpha of mixup; 0 is off
    augment.cutmix = 0.0  # alpha of cutmix; where both are on, each takes half of the steps
    augment.mix_token = 0.0  # alpha of MixToken, with model.token_labels; 0 is off
    return augment


def _train() -> ml_collections.ConfigDict:
    """The loss, its length and its seed."""
    train = ml_collections.ConfigDict()
    train.duration = "100 steps"
    train.seed = 0  # of weights, training data made on the fly, order, augmentation, stochastic depth
    train.label_smoothing = 0.0
    train.dense_weight = 1.0  # of the dense head's loss, with model.token_labels
    train.grad_accum_steps = 1  # parts that a batch is computed in, one after the other, to save memory
    train.max_skipped = 10  # steps in a row whose loss or gradient is not finite, before the run stops
    return train


def _optimizer() -> ml_collections.ConfigDict:
    """AdamW and its schedule."""
    optimizer = ml_collections.ConfigDict()
    optimizer.lr = 1e-3  # peak learning rate of AdamW
    optimizer.warmup = "0 steps"  # linear, from warmup_lr
    optimizer.warmup_lr = 1e-6
    optimizer.end_lr = 1e-6  # of the cosine, where the step after the last would be
    optimizer.cooldown = "0 steps"  # at end_lr, after the cosine; part of train.duration
    optimizer.schedule_origin = (
        "warmup"  # where the cosine starts: at the end of the "warmup", or at the "start"
    )
    optimizer.lr_update_every = ""  # the rate changes at this interval only; "" at every step
    optimizer.lr_update_delay = 0  # stairs by which it comes late
    optimizer.weight_decay = 0.05  # not on vectors (biases, norms, layer scales) and position tables
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.clip_norm = 0.0  # global gradient norm; 0 is off
    optimizer.freeze = ""  # weights that stay, as "patch_embed*,blocks1.*"; "*,!head.*" is a linear probe
    optimizer.layer_decay = 1.0  # factor on the learning rate for each layer further from the head
    optimizer.ema = 0.0  # decay of the weights' moving average, as 0.9999; 0 is off
    return optimizer


def _eval() -> ml_collections.ConfigDict:
    """Evaluations, on the way and at the end."""
    scoring = ml_collections.ConfigDict()
    scoring.every = ""  # evaluate at this interval and at the end; "" at the end only
    scoring.batch_size = 256  # examples at a time, each with all its views
    scoring.average = "logits"  # over views: of "logits" or of "softmax"
    scoring.ema = True  # scores the moving average, where there is one, and not the weights themselves
    scoring.max_unreadable = 0  # unreadable test examples that are tolerated; more, and no score is given
    return scoring


def _checkpoint() -> ml_collections.ConfigDict:
    """When checkpoints are saved, and which stay."""
    checkpoint = ml_collections.ConfigDict()
    checkpoint.every = "1 epochs"
    checkpoint.keep = 2  # how many of the latest stay
    checkpoint.keep_best = 0  # of the best on the way, by top1; evaluations are then saved
    checkpoint.keep_every = ""  # those at multiples of this duration stay too
    return checkpoint


def _mesh() -> ml_collections.ConfigDict:
    """Devices, and the processes of a run."""
    mesh = ml_collections.ConfigDict()
    mesh.device = "auto"  # "auto" takes JAX's own choice, "cpu", "gpu" or "tpu" insist
    mesh.data = -1  # devices along the data axis; -1 takes all that fsdp leaves
    mesh.fsdp = 1  # devices over which parameters and optimizer state are split as well
    mesh.heartbeat = 100  # seconds without a sign of life after which a process counts as lost
    mesh.compilation_cache = "auto"  # folder of compiled programs; "auto": JAX's or ~/.cache; "" none
    return mesh


# What weights expect of their inputs, by key of the section `data`, where neither weights nor user say it.
INPUTS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "channels": "rgb"}


def _override_types() -> dict[str, type]:
    kinds = {"str": str, "bool": bool, "int": int, "float": float, "float | None": float}
    kinds |= {"tuple[int, ...]": tuple, "int | tuple[int, ...]": object}
    return {
        field.name: kinds[str(field.type)] for field in dataclasses.fields(Variant) if field.name in OVERRIDES
    }


def matching(patterns: str, names: Collection[str], complaint: str) -> set[str]:
    """The names that comma-separated shell patterns match, the last one that matches deciding: one that
    starts with ! takes names out again.

    Raises:
      UserError: a pattern that matches nothing; says the `complaint`, with the pattern in its braces.
    """
    chosen: set[str] = set()
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        matched = set(fnmatch.filter(names, pattern.removeprefix("!")))
        if not matched:
            raise UserError(complaint.format(repr(pattern)))
        chosen = chosen - matched if pattern.startswith("!") else chosen | matched
    return chosen


def keys_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key of a configuration, which has one level of sections, with its value: "model.name"."""
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def model_arguments(config: ml_collections.ConfigDict) -> dict:
    """Name and overrides of the configured model, as arguments of `create_model`."""
    return {key: value for key, value in config.model.items() if value is not None}


class Durations(NamedTuple):
    """The configured durations in steps; 0 is never."""

    total: int
    warmup: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep_every: int = 0
    cooldown: int = 0
    stair: int = 0


def durations(config: ml_collections.ConfigDict, rows_per_epoch: int) -> Durations:
    """All durations of a configuration, for epochs of so many rows.

    Raises:
      UserError: one that cannot be read, a run of no steps, or a warm-up longer than the run.
    """

    def steps(key):
        section, name = key.split(".")
        return steps_in(config[section][name], f"config.{key}", config.data.batch_size, rows_per_epoch)

    keys = ("train.duration", "optimizer.warmup", "eval.every", "checkpoint.every", "checkpoint.keep_every")
    result = Durations(*map(steps, (*keys, "optimizer.cooldown", "optimizer.lr_update_every")))
    if result.total < 1:
        raise UserError(f"config.train.duration is {config.train.duration!r}; a run needs a step at least")
    if result.warmup + result.cooldown > result.total:
        key, part = ("cooldown", result.cooldown) if result.cooldown else ("warmup", result.warmup)
        raise UserError(
            f"config.optimizer.{key} is {part} steps, longer than the run of {result.total} has room for;"
            f" shorten it with --config.optimizer.{key}='N steps'"
        )
    return result


def steps_in(duration: str, key: str, batch_size: int, rows_per_epoch: int) -> int:
    """Steps in "N steps", "N epochs" or "N examples", rounded, at least one if N is not zero; "" is 0.

    An example is a row of a batch, so that copies (config.augment.repeated_augmentation) count.
    """
    if not duration:
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(steps?|epochs?|examples?)\s*", duration)
    if not match:
        raise UserError(f"{key} is {short(duration)}; write 'N steps', 'N epochs' or 'N examples'")
    number, unit = float(match[1]), match[2].rstrip("s")
    per_unit = {"step": 1.0, "epoch": rows_per_epoch / batch_size, "example": 1 / batch_size}[unit]
    if not number * per_unit < 2**31:
        raise UserError(f"{key} is {short(duration)}; it takes fewer than 2**31 steps")
    return max(round(number * per_unit), 1 if number else 0)


def _three(least: float) -> Callable[[Any], bool]:
    """Whether a value is None or three finite numbers above `least`."""

    def holds(xs):
        return xs is None or (
            len(xs) == 3 and all(isinstance(x, (int, float)) and least < x < math.inf for x in xs)
        )

    return holds


def _range(most: float) -> Callable[[Any], bool]:
    """Whether a value is two numbers in order, above 0 and up to `most`."""
    return lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= most


_LARGEST = 3.4e38  # just below the largest float32
_BATCH = 2**38  # bytes of the pixels of a batch, or of the views of an example
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (  # what they need, and keys, a word each
    (
        "to be at least 1",
        lambda n: n >= 1,
        "train.grad_accum_steps train.max_skipped checkpoint.keep mesh.fsdp mesh.heartbeat",
    ),
    ("to lie from 0 to 1024", lambda n: 0 <= n <= 1024, "data.workers"),
    ("to lie from 1 to 178956970, Pillow's limit", lambda n: 1 <= n <= 178956970, "data.max_pixels"),
    ("to lie from 1 to 2**31 - 1", lambda n: 1 <= n < 2**31, "data.max_frames"),
    (
        "to lie from 1 to 2**24",
        lambda n: 1 <= n <= 2**24,
        "data.batch_size eval.batch_size data.stride augment.repeated_augmentation",
    ),
    ("to lie from 1 to 2**14", lambda n: 1 <= n <= 2**14, "data.size data.test_clips"),
    ("to lie from 0 to 2**14", lambda n: 0 <= n <= 2**14, "data.frames data.short_side"),
    ("to be None, rgb or bgr", lambda value: value in (None, "rgb", "bgr"), "data.channels"),
    ("to be warmup or start", lambda value: value in ("warmup", "start"), "optimizer.schedule_origin"),
    ("to be average or centre", lambda value: value in ("average", "centre"), "init.inflate"),
    ("to be delta or fresh", lambda value: value in ("delta", "fresh"), "init.kernels"),
    ("to be logits or softmax", lambda value: value in ("logits", "softmax"), "eval.average"),
    ("to be 1 or 3", lambda n: n in (1, 3), "data.test_crops"),
    (
        "to lie from 0 to 1",
        lambda p: 0 <= p <= 1,
        "augment.flip augment.erase data.max_unreadable_fraction data.max_replaced_frames",
    ),
    ("to lie above 0, up to 1", lambda x: 0 < x <= 1, "data.crop_fraction optimizer.layer_decay"),
    ("two numbers, from and to, above 0 and up to 1", _range(1), "augment.crop_area"),
    ("two numbers, from and to, above 0", _range(math.inf), "augment.crop_aspect"),
    ("to be positive, and finite in float32", lambda x: 0 < x <= _LARGEST, "optimizer.lr optimizer.eps"),
    (
        "to be 0 or positive, and finite in float32",
        lambda x: 0 <= x <= _LARGEST,
        "optimizer.weight_decay optimizer.clip_norm optimizer.warmup_lr optimizer.end_lr init.noise"
        " augment.color_jitter augment.mixup augment.cutmix augment.mix_token",
    ),
    (
        "to lie from 0 to below 1",
        lambda x: 0 <= x < 1,
        "optimizer.b1 optimizer.b2 optimizer.ema train.label_smoothing data.val_fraction",
    ),
    (
        "to lie from 0 to below 2**31",
        lambda n: 0 <= n < 2**31,
        "train.seed data.train_examples data.test_examples optimizer.lr_update_delay eval.max_unreadable"
        " checkpoint.keep_best",
    ),
    ("to be -1 or at least 1", lambda n: n == -1 or n >= 1, "mesh.data"),
    ("a path of printable characters", lambda path: path.isprintable(), "mesh.compilation_cache"),
    ("to be auto, cpu, gpu or tpu", lambda d: d in ("auto", "cpu", "gpu", "tpu"), "mesh.device"),
    ("three finite numbers, one per channel", _three(-math.inf), "data.mean"),
    ("three finite numbers, one per channel, positive", _three(0), "data.std"),
)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, in one line, for the first value outside its range."""

    def require(key, holds, needs):
        value = config
        for part in key.split("."):
            value = value[part]
        try:
            fits = holds(value)
        except (TypeError, ValueError):  # of another type than the range is for
            fits = False
        if not fits:
            raise UserError(f"config.{key} is {short(value)}; it needs {needs}")

    for needs, holds, keys in _RANGES:
        for key in keys.split():
            require(key, holds, needs)
    data = config.data
    smallest = math.ceil(data.size / data.crop_fraction)
    fits = f"to be 0 or at least {smallest}, what config.data.size and crop_fraction ask for"
    require("data.short_side", lambda n: n == 0 or n >= smallest, fits)
    if data.test_clips > 1 and not data.frames:
        raise UserError("config.data.test_clips is more than 1, but there is one clip to an image")
    example = max(1, data.frames) * data.size**2 * 3
    views = example * data.test_clips * data.test_crops
    for key, size in (("batch_size", example * data.batch_size), ("test_clips", views)):
        if size > _BATCH:
            raise UserError(
                f"config.data.{key}={data[key]}, size={data.size} and frames={data.frames} make"
                f" {size / 2**30:,.0f} GiB of pixels at a time; the limit is {_BATCH >> 30} GiB"
            )


def short(value: Any) -> str:
    """Return a value as it is written in Python, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"
