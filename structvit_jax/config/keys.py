"""All keys of a configuration: default, range and meaning. Files in `configs/` only change values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from structvit_jax.models.variants import OVERRIDES, Variant
from structvit_jax.utils.errors import UserError

_LARGEST = 3.4e38  # just below the largest float32


class Range(NamedTuple):
    """The values that a key may have."""

    holds: Callable[[Any], bool]  # may raise TypeError or ValueError for a value of another type
    phrase: str  # completes "it needs ..." in an error message

    def contains(self, value: Any) -> bool:
        """Return whether a value is in the range; a value of another type is not."""
        try:
            return self.holds(value)
        except (TypeError, ValueError):
            return False


def _at_least(least: int) -> Range:
    return Range(lambda n: n >= least, f"to be at least {least}")


def _within(least: int, most: int, shown: str = "") -> Range:
    """Return the range of numbers from `least` to `most`; messages show `shown` instead of `most`."""
    return Range(lambda n: least <= n <= most, f"to lie from {least} to {shown or most}")


def _one_of(*values: str | int) -> Range:
    *most, last = map(str, values)
    return Range(lambda value: value in values, f"to be {', '.join(most)} or {last}")


def _is_triple(value: Any, above: float) -> bool:
    return len(value) == 3 and all(isinstance(x, int | float) and above < x < math.inf for x in value)


def _is_interval(value: Any, most: float) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] <= most


_ANY = Range(lambda _: True, "a value of its type")
_FRACTION = Range(lambda x: 0 <= x <= 1, "to lie from 0 to 1")
_BELOW_ONE = Range(lambda x: 0 <= x < 1, "to lie from 0 to below 1")
_POSITIVE_FRACTION = Range(lambda x: 0 < x <= 1, "to lie above 0, up to 1")
_POSITIVE = Range(lambda x: 0 < x <= _LARGEST, "to be positive, and finite in float32")
_NOT_NEGATIVE = Range(lambda x: 0 <= x <= _LARGEST, "to be 0 or positive, and finite in float32")
_COUNT = Range(lambda n: 0 <= n < 2**31, "to lie from 0 to below 2**31")
_ALL_OR_COUNT = Range(lambda n: n == -1 or n >= 1, "to be -1 or at least 1")
_FRACTIONS = Range(lambda x: _is_interval(x, 1), "two numbers, from and to, above 0 and up to 1")
_RATIOS = Range(lambda x: _is_interval(x, math.inf), "two numbers, from and to, above 0")
_TRIPLE = Range(lambda x: _is_triple(x, -math.inf), "three finite numbers, one per channel")
_POSITIVE_TRIPLE = Range(lambda x: _is_triple(x, 0), "three positive finite numbers, one per channel")
_PATH = Range(lambda path: isinstance(path, str) and path.isprintable(), "a path of printable characters")
_BATCH_AXIS = _within(1, 2**24, "2**24")
_SIDE = _within(1, 2**14, "2**14")
_OPTIONAL_SIDE = _within(0, 2**14, "2**14")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    default: Any  # None: not set; the initial weights or the named model set it
    meaning: str
    range: Range = _ANY
    unset_type: type | None = None  # type of the values, if the default is None

    @property
    def type(self) -> type:
        """The type of its values."""
        return self.unset_type or type(self.default)


def _model_keys() -> dict[str, Key]:
    """Return one key per field of `Variant`; None keeps the value of the named model."""
    types = {"str": str, "bool": bool, "int": int, "float": float, "float | None": float}
    types |= {"tuple[int, ...]": tuple, "int | tuple[int, ...]": object}
    meaning = "see structvit_jax.models.Variant; None keeps the value of the named model"
    return {
        f"model.{field.name}": Key(None, meaning, _ANY, types[str(field.type)])
        for field in dataclasses.fields(Variant)
        if field.name in OVERRIDES
    }


# A duration is "N steps", "N epochs" or "N examples", where N may be a fraction; "" means never.
KEYS: dict[str, Key] = {
    "init_from": Key(
        "",
        "weights to start from: a run, a checkpoint or a released file; '': from scratch; None: not set yet",
    ),
    # How to adapt the weights of init_from to the model.
    "init.inflate": Key("average", "how to spread image kernels over time", _one_of("average", "centre")),
    "init.kernels": Key(
        "delta",
        "StructSA kernels if the weights have none: 'delta' keeps plain attention, 'fresh' is random",
        _one_of("delta", "fresh"),
    ),
    "init.noise": Key(
        0.1, "standard deviation of the noise that makes equal value kernels differ", _NOT_NEGATIVE
    ),
    # The model: its name, and fields that override those of the named model.
    "model.name": Key("structvit_tiny_4_1_video", "a model: see structvit_jax.list_models"),
    **_model_keys(),
    # The data and how to read them.
    "data.name": Key("moving_digits", "a data set: see structvit_jax.data.SOURCES"),
    "data.root": Key("", "folder of the data set: its splits, or IDX files for moving garments"),
    "data.train_split": Key("train", "training split below the root: a folder of class folders, or a list"),
    "data.test_split": Key(
        "val",
        "test split, in the same form; 'tune' is a validation split: held-out training images of IDX files,"
        " or other clips of the training images of moving digits and garments",
    ),
    "data.val_fraction": Key(
        0.0,
        "fraction of the training examples to hold out if there is no test split; with 0, one is required",
        _BELOW_ONE,
    ),
    "data.batch_size": Key(
        64, "clips or images per step on all devices, copies by repeated augmentation included", _BATCH_AXIS
    ),
    "data.train_examples": Key(0, "examples per epoch of generated data", _COUNT),
    "data.test_examples": Key(0, "test examples of generated data", _COUNT),
    "data.mean": Key(
        None, "mean per channel, pixels scaled to 0..1; None: that of init_from, else 0.5", _TRIPLE, tuple
    ),
    "data.std": Key(
        None, "standard deviation per channel; None: that of init_from, else 0.5", _POSITIVE_TRIPLE, tuple
    ),
    "data.channels": Key(
        None, "order of the channels; None: that of init_from, else rgb", _one_of("rgb", "bgr"), str
    ),
    "data.frames": Key(8, "frames of a clip; 0 means images", _OPTIONAL_SIDE),
    "data.stride": Key(
        1, "a clip spans frames x stride frames of its video; unused by segment sampling", _BATCH_AXIS
    ),
    "data.sampling": Key(
        "dense", "choice of frames: dense, strided or segment, see structvit_jax.data.sampling"
    ),
    "data.size": Key(24, "height and width of the model's input in pixels", _SIDE),
    "data.short_side": Key(
        0, "shrink frames to this short side while decoding, in pixels; 0 keeps their size", _OPTIONAL_SIDE
    ),
    "data.crop_fraction": Key(
        1.0, "side of a test crop, as a fraction of the short side", _POSITIVE_FRACTION
    ),
    "data.test_clips": Key(
        1, "clips of a test example; scores are averaged over test_clips x test_crops views", _SIDE
    ),
    "data.test_crops": Key(1, "crops of a test clip: 1 (centre) or 3 (left, centre, right)", _one_of(1, 3)),
    "data.label_maps": Key("", "folder of label maps for token labelling, see structvit prepare label_maps"),
    "data.workers": Key(
        -1,
        "number of processes that decode; 0: two threads; -1: one per CPU core for files, two threads for"
        " generated data",
        _within(-1, 1024),
    ),
    "data.cache": Key(
        "auto",
        "keep decoded frames in memory during training; 'auto': if those of all files fit",
        _one_of("auto", "on", "off"),
    ),
    "data.cache_gib": Key(
        0.0,
        "largest memory of the cache in GiB; 0: a quarter of the memory that is available at the start",
        _within(0, 2**20, "2**20"),
    ),
    "data.max_pixels": Key(
        2**26,
        "largest width x height of an image or frame that is decoded",
        _within(1, 178956970, "178956970, Pillow's limit"),
    ),
    "data.max_frames": Key(
        2**20,
        "largest number of frames of a video or folder that is read",
        _within(1, 2**31 - 1, "2**31 - 1"),
    ),
    "data.max_replaced_frames": Key(
        0.0, "largest fraction of a clip that may be unreadable; neighbouring frames replace it", _FRACTION
    ),
    "data.max_unreadable_fraction": Key(
        0.05, "largest fraction of unreadable training examples; with more, the run stops", _FRACTION
    ),
    # Augmentation of training examples; all off by default.
    "augment.crop_area": Key(
        (1.0, 1.0), "random crops: range of their fraction of the frame, drawn uniformly", _FRACTIONS
    ),
    "augment.crop_aspect": Key(
        (1.0, 1.0), "random crops: range of width / height, drawn log-uniformly", _RATIOS
    ),
    "augment.flip": Key(0.0, "probability of flipping left and right", _FRACTION),
    "augment.color_jitter": Key(
        0.0,
        "strength s of the jitter of brightness, contrast and saturation: factors from 1 - s to 1 + s",
        _NOT_NEGATIVE,
    ),
    "augment.randaugment": Key("", "RandAugment policy, such as rand-m7-n4-mstd0.5-inc1; '' is off"),
    "augment.repeated_augmentation": Key(
        1, "copies of an example in a batch, each augmented differently", _BATCH_AXIS
    ),
    "augment.erase": Key(0.0, "probability of random erasing", _FRACTION),
    "augment.mixup": Key(0.0, "alpha of mixup; 0 is off", _NOT_NEGATIVE),
    "augment.cutmix": Key(
        0.0, "alpha of CutMix; 0 is off; with mixup, each batch uses one of them at random", _NOT_NEGATIVE
    ),
    "augment.mix_token": Key(0.0, "alpha of MixToken, with model.token_labels; 0 is off", _NOT_NEGATIVE),
    # The loss, the length of the run and its seed.
    "train.duration": Key("100 steps", "length of the run"),
    "train.seed": Key(0, "seed of weights, generated data, order, augmentation and stochastic depth", _COUNT),
    "train.label_smoothing": Key(0.0, "fraction of the label spread over all classes", _BELOW_ONE),
    "train.dense_weight": Key(1.0, "weight of the dense head's loss, with model.token_labels", _NOT_NEGATIVE),
    "train.grad_accum_steps": Key(
        1, "number of parts of a batch, computed one after another to save memory", _at_least(1)
    ),
    "train.max_skipped": Key(10, "non-finite steps in a row before the run stops", _at_least(1)),
    # The optimizer and its schedule.
    "optimizer.name": Key(
        "adamw",
        "adamw, as in the paper; or muon: orthogonalised updates of matrices, AdamW for all others",
        _one_of("adamw", "muon"),
    ),
    "optimizer.lr": Key(1e-3, "peak learning rate", _POSITIVE),
    "optimizer.warmup": Key("0 steps", "duration of the linear warm-up from warmup_lr to lr"),
    "optimizer.warmup_lr": Key(1e-6, "learning rate at step 0", _NOT_NEGATIVE),
    "optimizer.end_lr": Key(
        1e-6, "final learning rate, after the last step or from the start of the cool-down on", _NOT_NEGATIVE
    ),
    "optimizer.cooldown": Key("0 steps", "duration at end_lr after the cosine; included in train.duration"),
    "optimizer.schedule_origin": Key(
        "warmup",
        "start of the cosine: the end of the warm-up, or the start of the run",
        _one_of("warmup", "start"),
    ),
    "optimizer.lr_update_every": Key("", "interval at which the learning rate changes; '': every step"),
    "optimizer.lr_update_delay": Key(
        0, "number of these intervals by which the learning rate lags behind the schedule", _COUNT
    ),
    "optimizer.weight_decay": Key(
        0.05,
        "weight decay, except of vectors (biases, norms, layer scales) and position embeddings",
        _NOT_NEGATIVE,
    ),
    "optimizer.b1": Key(0.9, "decay of AdamW's first moment", _BELOW_ONE),
    "optimizer.b2": Key(0.999, "decay of AdamW's second moment", _BELOW_ONE),
    "optimizer.eps": Key(1e-8, "epsilon of AdamW", _POSITIVE),
    "optimizer.clip_norm": Key(0.0, "largest global gradient norm; 0 is off", _NOT_NEGATIVE),
    "optimizer.freeze": Key(
        "", "weights that are not trained, such as 'patch_embed*,blocks1.*'; '*,!head.*' is a linear probe"
    ),
    "optimizer.layer_decay": Key(
        1.0, "factor on the learning rate for each layer further from the head", _POSITIVE_FRACTION
    ),
    "optimizer.ema": Key(0.0, "decay of the weights' moving average, such as 0.9999; 0 is off", _BELOW_ONE),
    # Evaluations, during and after training.
    "eval.every": Key("", "interval between evaluations; '': only one, at the end"),
    "eval.batch_size": Key(256, "test examples per batch, each with all its views", _BATCH_AXIS),
    "eval.average": Key("logits", "what to average over views", _one_of("logits", "softmax")),
    "eval.ema": Key(True, "evaluate the moving average of the weights, if there is one"),
    "eval.max_unreadable": Key(
        0, "number of unreadable test examples to tolerate; with more, there is no score", _COUNT
    ),
    # When to save checkpoints, and which to keep.
    "checkpoint.every": Key("1 epochs", "interval at which to save"),
    "checkpoint.keep": Key(2, "number of latest checkpoints to keep", _at_least(1)),
    "checkpoint.keep_best": Key(
        0, "number of checkpoints to keep, by best top1; if above 0, each evaluation saves one", _COUNT
    ),
    "checkpoint.keep_every": Key("", "also keep checkpoints at multiples of this duration"),
    # Devices and processes of a run.
    "mesh.device": Key(
        "auto", "platform; 'auto' leaves the choice to JAX", _one_of("auto", "cpu", "gpu", "tpu")
    ),
    "mesh.data": Key(-1, "devices along the data axis; -1: all devices / mesh.fsdp", _ALL_OR_COUNT),
    "mesh.fsdp": Key(
        1, "devices along the fsdp axis, which shards parameters and optimizer state", _at_least(1)
    ),
    "mesh.heartbeat": Key(
        100, "seconds without a heartbeat after which a process is assumed dead", _at_least(1)
    ),
    "mesh.compilation_cache": Key(
        "auto", "folder to cache compiled programs; 'auto': that of JAX, else ~/.cache; '': no cache", _PATH
    ),
}

# Values of data.mean, data.std and data.channels that neither the configuration nor the weights set.
INPUTS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "channels": "rgb"}
_BATCH_BYTES = 2**38  # limit on the pixels of a batch, and on those of all views of an example


def default_config() -> ml_collections.ConfigDict:
    """Return a configuration with the defaults of KEYS; it is locked, so that unknown keys are errors."""
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
        needs = "" if key.range is _ANY else f"; needs {key.range.phrase}"
        lines.append(f"{name:<{width}}  {key.default!r}  {key.meaning}{needs}")
    return "\n".join(lines)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first value outside its range."""
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
    """Return the value of a key such as "data.size"."""
    section, _, inner = name.rpartition(".")
    return config[section][inner] if section else config[inner]


def set_value(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Set a key such as "data.size" in place.

    Raises:
      TypeError: the value has another type.
    """
    section, _, inner = name.rpartition(".")
    (config[section] if section else config)[inner] = value


def keys_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key of a configuration, such as "data.size", and its value. Sections are not nested."""
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def model_arguments(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the name of the model and the fields that are set, as arguments of `create_model`."""
    return {key: value for key, value in config.model.items() if value is not None}


def short(value: Any) -> str:
    """Return the repr of a value; if it is long, cut out its middle."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"
