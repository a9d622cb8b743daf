"""Every key of a configuration, once: default, range and meaning. Files in `configs/` change values only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from structvit_jax.config.ranges import (
    ALL_OR_COUNT,
    ANY,
    BELOW_ONE,
    COUNT,
    FRACTION,
    FRACTIONS,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    POSITIVE_FRACTION,
    POSITIVE_TRIPLE,
    RATIOS,
    TRIPLE,
    Range,
    at_least,
    one_of,
    within,
)
from structvit_jax.models.variants import OVERRIDES, Variant
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    default: Any  # None: not set, so that weights or the named model decide
    meaning: str
    range: Range = ANY
    unset_type: type | None = None  # of values, where the default is None

    @property
    def type(self) -> Any:
        """The type of its values."""
        return self.unset_type or type(self.default)


def _model_keys() -> dict[str, Key]:
    """Return the keys of a variant's fields; None keeps the named model's own value."""
    types = {"str": str, "bool": bool, "int": int, "float": float, "float | None": float}
    types |= {"tuple[int, ...]": tuple, "int | tuple[int, ...]": object}
    return {
        f"model.{field.name}": Key(
            None,
            "field of structvit_jax.models.Variant; None keeps the named model's",
            ANY,
            types[str(field.type)],
        )
        for field in dataclasses.fields(Variant)
        if field.name in OVERRIDES
    }


_BATCH_AXIS = within(1, 2**24, "2**24")
_SIDE = within(1, 2**14, "2**14")
_OPTIONAL_SIDE = within(0, 2**14, "2**14")

# Durations are "N steps", "N epochs" or "N examples", and N may be a fraction; "" is never.
KEYS: dict[str, Key] = {
    "init_from": Key(
        "", "weights to start from: a run, a checkpoint or a released file; '' starts from scratch"
    ),
    # How the weights of init_from are fitted to the model.
    "init.inflate": Key("average", "how image kernels are spread over time", one_of("average", "centre")),
    "init.kernels": Key(
        "delta",
        "StructSA from plain attention: the same function, or re-initialised kernels",
        one_of("delta", "fresh"),
    ),
    "init.noise": Key(0.1, "deviation that sets equal value kernels apart; their sum stays", NOT_NEGATIVE),
    # The model: a name, and any field of its variant.
    "model.name": Key("structvit_tiny_4_1_video", "see structvit_jax.list_models"),
    **_model_keys(),
    # The data, and how they are read.
    "data.name": Key("moving_digits", "see structvit_jax.data.SOURCES"),
    "data.root": Key("", "folder that holds the splits of the data set 'folder'"),
    "data.train_split": Key("train", "a folder of class folders, or a list, below the root"),
    "data.test_split": Key(
        "val", "the same for testing; moving_digits has 'tune', validation clips of training scans"
    ),
    "data.val_fraction": Key(
        0.0, "fraction of training examples held out if a folder has no test split; 0: an error", BELOW_ONE
    ),
    "data.batch_size": Key(64, "clips or images per step on all devices, copies included", _BATCH_AXIS),
    "data.train_examples": Key(0, "examples per epoch of generated data", COUNT),
    "data.test_examples": Key(0, "test examples of generated data", COUNT),
    "data.mean": Key(
        None, "subtracted from channels scaled to 0..1; None follows the weights", TRIPLE, tuple
    ),
    "data.std": Key(None, "divides what is left; None follows the weights", POSITIVE_TRIPLE, tuple),
    "data.channels": Key(None, "order of the channels; None follows the weights", one_of("rgb", "bgr"), str),
    "data.frames": Key(8, "frames of a clip; 0 means images", _OPTIONAL_SIDE),
    "data.stride": Key(1, "a clip spans frames x stride frames of its video", _BATCH_AXIS),
    "data.sampling": Key("dense", "dense, strided or segment: see structvit_jax.data.sampling"),
    "data.size": Key(24, "height and width of the model's input, pixels", _SIDE),
    "data.short_side": Key(
        0, "scale larger frames to this while decoding; 0 keeps their size", _OPTIONAL_SIDE
    ),
    "data.crop_fraction": Key(1.0, "fraction of the short side that a test crop takes", POSITIVE_FRACTION),
    "data.test_clips": Key(1, "clips of a test example; scores are averaged over clips x crops views", _SIDE),
    "data.test_crops": Key(
        1, "crops of a test example: 1 is the centre; 3 are left, centre and right", one_of(1, 3)
    ),
    "data.label_maps": Key("", "folder of label maps, for token labelling: see structvit prepare label_maps"),
    "data.workers": Key(0, "processes that decode; 0 reads in threads", within(0, 1024)),
    "data.max_pixels": Key(
        2**26,
        "width x height of a picture or frame; larger ones are not decoded",
        within(1, 178956970, "178956970, Pillow's limit"),
    ),
    "data.max_frames": Key(
        2**20, "frames of a video or folder; longer ones are not read", within(1, 2**31 - 1, "2**31 - 1")
    ),
    "data.max_replaced_frames": Key(0.0, "fraction of a clip's frames that neighbours may replace", FRACTION),
    "data.max_unreadable_fraction": Key(
        0.05, "largest fraction of unreadable training examples; beyond it the run stops", FRACTION
    ),
    # Augmentation of training examples; all off by default.
    "augment.crop_area": Key((1.0, 1.0), "random crops: fraction of the frame, drawn uniformly", FRACTIONS),
    "augment.crop_aspect": Key((1.0, 1.0), "random crops: width / height, drawn log-uniformly", RATIOS),
    "augment.flip": Key(0.0, "probability of mirroring", FRACTION),
    "augment.color_jitter": Key(0.0, "brightness, contrast, saturation: factors of 1 +- this", NOT_NEGATIVE),
    "augment.randaugment": Key("", "a policy, as rand-m7-n4-mstd0.5-inc1; '' is off"),
    "augment.repeated_augmentation": Key(
        1, "copies of an example in a batch, each augmented differently", _BATCH_AXIS
    ),
    "augment.erase": Key(0.0, "probability of random erasing", FRACTION),
    "augment.mixup": Key(0.0, "alpha of mixup; 0 is off", NOT_NEGATIVE),
    "augment.cutmix": Key(0.0, "alpha of cutmix; with mixup, each takes half of the steps", NOT_NEGATIVE),
    "augment.mix_token": Key(0.0, "alpha of MixToken, with model.token_labels; 0 is off", NOT_NEGATIVE),
    # The loss, the length of the run and its seed.
    "train.duration": Key("100 steps", "length of the run"),
    "train.seed": Key(0, "seed of weights, generated data, order, augmentation and stochastic depth", COUNT),
    "train.label_smoothing": Key(0.0, "fraction of the label spread over all classes", BELOW_ONE),
    "train.dense_weight": Key(1.0, "weight of the dense head's loss, with model.token_labels", NOT_NEGATIVE),
    "train.grad_accum_steps": Key(1, "parts of a batch, computed in turn to save memory", at_least(1)),
    "train.max_skipped": Key(10, "non-finite steps in a row before the run stops", at_least(1)),
    # AdamW and its schedule.
    "optimizer.lr": Key(1e-3, "peak learning rate of AdamW", POSITIVE),
    "optimizer.warmup": Key("0 steps", "linear warm-up from warmup_lr"),
    "optimizer.warmup_lr": Key(1e-6, "learning rate at step 0", NOT_NEGATIVE),
    "optimizer.end_lr": Key(1e-6, "end of the cosine, where the step after the last would be", NOT_NEGATIVE),
    "optimizer.cooldown": Key("0 steps", "steps at end_lr after the cosine; part of train.duration"),
    "optimizer.schedule_origin": Key(
        "warmup",
        "start of the cosine: the end of the warm-up, or the start of the run",
        one_of("warmup", "start"),
    ),
    "optimizer.lr_update_every": Key("", "interval at which the learning rate changes; '' is every step"),
    "optimizer.lr_update_delay": Key(0, "intervals by which an update comes late", COUNT),
    "optimizer.weight_decay": Key(
        0.05, "not applied to vectors (biases, norms, layer scales) and position tables", NOT_NEGATIVE
    ),
    "optimizer.b1": Key(0.9, "decay of AdamW's first moment", BELOW_ONE),
    "optimizer.b2": Key(0.999, "decay of AdamW's second moment", BELOW_ONE),
    "optimizer.eps": Key(1e-8, "epsilon of AdamW", POSITIVE),
    "optimizer.clip_norm": Key(0.0, "largest global gradient norm; 0 is off", NOT_NEGATIVE),
    "optimizer.freeze": Key(
        "", "weights that are not trained, as 'patch_embed*,blocks1.*'; '*,!head.*' is a linear probe"
    ),
    "optimizer.layer_decay": Key(
        1.0, "factor on the learning rate for each layer further from the head", POSITIVE_FRACTION
    ),
    "optimizer.ema": Key(0.0, "decay of the weights' moving average, as 0.9999; 0 is off", BELOW_ONE),
    # Evaluations, during and after training.
    "eval.every": Key("", "interval of evaluations, besides the one at the end; '' is none"),
    "eval.batch_size": Key(256, "examples at a time, each with all its views", _BATCH_AXIS),
    "eval.average": Key("logits", "what is averaged over views", one_of("logits", "softmax")),
    "eval.ema": Key(True, "evaluate the moving average of the weights, if there is one"),
    "eval.max_unreadable": Key(0, "unreadable test examples tolerated; with more, no score is given", COUNT),
    # When checkpoints are saved, and which are kept.
    "checkpoint.every": Key("1 epochs", "interval of saving"),
    "checkpoint.keep": Key(2, "latest checkpoints to keep", at_least(1)),
    "checkpoint.keep_best": Key(
        0, "best checkpoints to keep, by top1; each evaluation then saves one", COUNT
    ),
    "checkpoint.keep_every": Key("", "checkpoints at multiples of this duration are kept, too"),
    # Devices, and the processes of a run.
    "mesh.device": Key("auto", "'auto' is JAX's own choice", one_of("auto", "cpu", "gpu", "tpu")),
    "mesh.data": Key(-1, "devices along the data axis; -1 is all that fsdp leaves", ALL_OR_COUNT),
    "mesh.fsdp": Key(1, "devices that parameters and optimizer state are sharded over", at_least(1)),
    "mesh.heartbeat": Key(100, "seconds without a heartbeat until a process is assumed dead", at_least(1)),
    "mesh.compilation_cache": Key(
        "auto", "folder of compiled programs; 'auto' is JAX's or ~/.cache, '' none", PATH
    ),
}

# Inputs that weights expect (keys of the section `data`), where neither they nor the user state it.
INPUTS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "channels": "rgb"}
_BATCH_BYTES = 2**38  # of the pixels of a batch, or of the views of an example


def default_config() -> ml_collections.ConfigDict:
    """Return the defaults of KEYS, locked: a key that does not exist is an error."""
    config = ml_collections.ConfigDict()
    for name, key in KEYS.items():
        section = name.rpartition(".")[0]
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        set_value(config, name, config_dict.placeholder(key.type) if key.default is None else key.default)
    return config.lock()


def describe_keys() -> str:
    """Return a line per key: its default, its meaning and its range."""
    width = max(map(len, KEYS))
    lines = []
    for name, key in KEYS.items():
        needs = "" if key.range is ANY else f"; needs {key.range.phrase}"
        lines.append(f"{name:<{width}}  {key.default!r}  {key.meaning}{needs}")
    return "\n".join(lines)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, in one line, for the first value outside its range."""
    for name, key in KEYS.items():
        if (value := get_value(config, name)) is not None or key.default is not None:
            _check(name, value, key.range)
    data = config.data
    smallest = math.ceil(data.size / data.crop_fraction)
    phrase = f"to be 0 or at least {smallest}, because of config.data.size and crop_fraction"
    _check("data.short_side", data.short_side, Range(lambda n: n == 0 or n >= smallest, phrase))
    if data.test_clips > 1 and not data.frames:
        raise UserError("config.data.test_clips is more than 1, but an image has only one clip; set it to 1")
    example = max(1, data.frames) * data.size**2 * 3
    views = example * data.test_clips * data.test_crops
    for inner, size in (("batch_size", example * data.batch_size), ("test_clips", views)):
        if size > _BATCH_BYTES:
            raise UserError(
                f"config.data.{inner}={data[inner]}, size={data.size} and frames={data.frames} make"
                f" {size / 2**30:,.0f} GiB of pixels at a time; the limit is {_BATCH_BYTES >> 30} GiB"
            )


def _check(name: str, value: Any, allowed: Range) -> None:
    if not allowed.contains(value):
        raise UserError(f"config.{name} is {short(value)}; it needs {allowed.phrase}")


def get_value(config: ml_collections.ConfigDict, name: str) -> Any:
    """Return the value of a key, as "data.size"."""
    section, _, inner = name.rpartition(".")
    return config[section][inner] if section else config[inner]


def set_value(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Set a key, as "data.size", in place.

    Raises:
      TypeError: a value of another type.
    """
    section, _, inner = name.rpartition(".")
    (config[section] if section else config)[inner] = value


def keys_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key of a configuration, as "data.size", and its value. It has one level of sections."""
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def model_arguments(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return name and overrides of the configured model, as arguments of `create_model`."""
    return {key: value for key, value in config.model.items() if value is not None}


def short(value: Any) -> str:
    """Return a value as Python writes it, without the middle of a long one."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"
