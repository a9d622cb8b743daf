"""Fit the weights of one model to another.

If possible, the new weights compute the same function as the old ones. Plain attention becomes structural
attention with D equal kernels, which are one at the centre of the window and zero elsewhere. The softmax over
all kernels and the sum over them then give plain attention again. Existing structure kernels are repeated to
increase D, and padded with zeros to enlarge their windows.

Equal kernels would always get equal gradients and stay equal. So noise is added to the value kernels. The
noise sums to zero over equal kernels, which leaves the output unchanged.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from structvit_jax.convert.array_names import Arrays, from_torch
from structvit_jax.convert.source import Source
from structvit_jax.models import Network
from structvit_jax.models.positions import resize_positions
from structvit_jax.models.variants import Variant
from structvit_jax.models.weights import cast_like, split, update
from structvit_jax.utils import class_names
from structvit_jax.utils.errors import UserError

Model = TypeVar("Model", bound=Network)
NOISE = 0.1  # default standard deviation
# Fields of the variant that fitting cannot change.
_SAME = ("network", "depths", "widths", "head_width", "patch", "stem", "mixer_window")
_HEAD = r"(aux_)?head\.(kernel|bias)"
_STRUCTURE = r".*\.attn\.(key|value)_kernels"
_SCALE = r".*\.gamma_[12]"


@dataclasses.dataclass(frozen=True)
class Rules:
    """Options for fitting weights: the section `init` of a configuration."""

    inflate: str = "average"  # how image kernels are spread over time: "average" or "centre", see `inflate`
    kernels: str = (
        "delta"  # start of missing structure kernels: "delta" (plain attention) or "fresh" (random)
    )
    noise: float = NOISE  # standard deviation of the noise that is added to equal value kernels
    seed: int = 0  # seed of the noise


class Action(enum.Enum):
    """The way in which an array was fitted. The values are printed in summaries."""

    KEPT = "carried over"
    REORDERED = "reordered by class name"
    RESIZED = "positions resized"
    INFLATED = "inflated in time"
    STARTED = "structure kernels that start as plain attention"
    REPEATED = "structure kernels repeated"
    PADDED = "structure kernels in larger windows"
    UNSHARED = "shared structure kernels copied to every channel"
    SET_TO_ONE = "layer scales missing in the weights, set to one"
    FOLDED = "layer scales multiplied into the layers before them"
    REINITIALISED = "re-initialised"
    DROPPED = "dropped, because the model has no such arrays"


class Outcome(NamedTuple):
    """The action on one array, with a detail: how or why it was done."""

    action: Action
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.action.value}, {self.detail}" if self.detail else self.action.value


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Weights that fit a model."""

    arrays: Arrays  # all arrays of the model, by name
    outcomes: dict[str, Outcome]  # by name, for all arrays of the model and all other arrays of the source
    notes: list[str]  # notes and warnings to print, one line each

    def lines(self) -> list[str]:
        """Return the lines of a summary: one line per outcome, then the notes."""
        groups: dict[Outcome, list[str]] = {}
        for name, outcome in self.outcomes.items():
            groups.setdefault(outcome, []).append(name)
        return [self._line(outcome, names) for outcome, names in groups.items()] + self.notes

    def _line(self, outcome: Outcome, names: list[str]) -> str:
        values = sum(self.arrays[name].size for name in names if name in self.arrays)
        line = f"{outcome}: {len(names)} array{'s' * (len(names) > 1)}"
        return line + f", {values:,} values" * bool(values) + f": {', '.join(names)}" * (len(names) <= 4)


class _MisfitError(Exception):
    """An array cannot be fitted; the message names it."""


_Fitted = tuple[Outcome, np.ndarray]  # an array that fits the model, and how it was made


def adapt(
    source: Source,
    fresh: Mapping[str, jax.Array],
    variant: Variant,
    names: Sequence[str] | None,
    rules: Rules,
    *,
    strict: bool = False,
) -> Adapted:
    """Fit weights to a model.

    The head is kept if the weights and the model have the same class names, in any order; see
    `structvit_jax.utils.class_names.match`. Otherwise it is re-initialised, and the summary says why.

    Args:
      source: the weights.
      fresh: the model's parameters and batch statistics, newly initialised. Re-initialised arrays are copied
        from here.
      variant: the variant of the model.
      names: the model's class names, in order; None if its classes are those of the weights, in their order.
      rules: options for fitting.
      strict: raise an error instead of re-initialising or dropping an array.

    Raises:
      UserError: the weights are those of another network; or some arrays do not fit, and the message lists
        all of them.
    """
    _check_same(source, variant)
    given, outcomes = _fold_scales(source, fresh)
    head = _match_classes(source, names, fresh["head.bias"].size if "head.bias" in fresh else 0)
    arrays: Arrays = {}
    misfits: list[str] = []
    for name, array in fresh.items():
        old, own = given.pop(name, None), np.asarray(array)
        try:
            if re.fullmatch(_HEAD, name):
                outcome, fitted = _fit_head(name, old, own, head)
            elif re.fullmatch(_STRUCTURE, name):
                outcome, fitted = _fit_structure(name, old, own, rules)
            else:
                outcome, fitted = _fit(name, old, own, rules)
        except _MisfitError as error:
            misfits.append(str(error))
            continue
        if strict and outcome.action is Action.REINITIALISED:
            misfits.append(f"{name} would be {outcome}")
        outcomes[name], arrays[name] = outcome, fitted
    for name in given:
        if not strict and re.fullmatch(rf"aux_head.*|{_STRUCTURE}", name):
            outcomes[name] = Outcome(Action.DROPPED)
        else:
            misfits.append(f"extra {name}")
    if misfits:
        raise UserError(f"{source.where}: arrays that do not fit ({len(misfits)}): {'; '.join(misfits)}")
    return Adapted(arrays, outcomes, [*head.notes, *_notes(source.variant, variant, rules)])


def load_uniformer(
    model: Model,
    state_dict: Mapping[str, np.ndarray],
    *,
    inflate: str = "average",
    noise: float = NOISE,
    seed: int = 0,
) -> Model:
    """Copy the weights of a PyTorch UniFormer into `model` and return it.

    A StructViT with stride 1 then computes the same outputs as the UniFormer, up to rounding, because its
    structure kernels start as plain attention. For a video model, image weights are inflated, which changes
    the logits.

    Args:
      model: a UniFormer or StructViT of the same size.
      state_dict: maps PyTorch's keys to NumPy arrays in PyTorch's layout. The arrays are copied.
      inflate: "average" or "centre", see `structvit_jax.convert.adapt.inflate`.
      noise: standard deviation of the noise that is added to the value kernels; with 0, all structure kernels
        stay equal.
      seed: seed of the noise.

    Raises:
      UserError: some arrays are missing, unknown or of another shape. The message lists all of them, and the
        model is unchanged.
    """
    arrays = from_torch(state_dict)
    position = arrays.get("blocks1.0.pos_embed.kernel")
    video = position is not None and position.ndim == 5
    source = Source(
        arrays,
        variant=dataclasses.replace(model.variant, structure_dim=0, stride=1, video=video),
        model={"name": "UniFormer"},
        num_classes=arrays["head.bias"].size if "head.bias" in arrays else 0,
        class_names=None,
        inputs=None,
        where="the state dict",
    )
    own = split(model)[1]
    rules = Rules(inflate=inflate, noise=noise, seed=seed)
    adapted = adapt(source, own.params | own.batch_stats, model.variant, None, rules, strict=True)
    for note in adapted.notes:
        warnings.warn(note, stacklevel=2)
    update(model, cast_like(own, adapted.arrays))
    return model


def inflate(kernel: np.ndarray, frames: int, how: str) -> np.ndarray:
    """Return a video kernel made from an image kernel, [frames, *kernel.shape].

    "average" spreads the kernel evenly over the frames, as the released UniFormer does. "centre" puts it on
    the middle frame, so that a clip of one repeated image gives the logits of that image.
    """
    if how == "average":
        return np.repeat(kernel[None], frames, axis=0) / np.asarray(frames, kernel.dtype)
    inflated = np.zeros((frames, *kernel.shape), kernel.dtype)
    inflated[(frames - 1) // 2] = kernel
    return inflated


def _check_same(source: Source, variant: Variant) -> None:
    """Raise UserError unless the weights can be fitted to this variant."""
    theirs = source.variant
    same = (*_SAME, "tubelet") if theirs.video and variant.video else _SAME
    if differ := [key for key in same if getattr(theirs, key) != getattr(variant, key)]:
        fields = (f"{key} is {getattr(theirs, key)}, not {getattr(variant, key)}" for key in differ)
        raise UserError(
            f"{source.where} holds a {source.model['name']}, a different network from the model"
            f" ({'; '.join(fields)}); choose a model of that size, or other weights"
        )
    if theirs.video and not variant.video:
        raise UserError(f"{source.where} holds a video model, {source.model['name']}; the model takes images")


def _fit(name: str, given: np.ndarray | None, own: np.ndarray, rules: Rules) -> _Fitted:
    """Fit the array `given` of the weights to the array `own` of the model."""
    if given is None and re.fullmatch(_SCALE, name):
        return Outcome(Action.SET_TO_ONE), np.ones_like(own)
    if given is None:
        raise _MisfitError(f"missing {name}")
    if name == "pos_embed" and given.shape != own.shape:
        return Outcome(Action.RESIZED), _positions(given, own.shape)
    if given.shape == own.shape[1:]:
        return Outcome(Action.INFLATED, f"by {rules.inflate}"), inflate(given, own.shape[0], rules.inflate)
    if given.shape != own.shape:
        raise _misshapen(name, given, own)
    return Outcome(Action.KEPT), given


def _misshapen(name: str, given: np.ndarray, own: np.ndarray) -> _MisfitError:
    return _MisfitError(f"misshapen {name}: its shape is {given.shape}, not {own.shape}")


def _positions(given: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a position table resized to another grid, as in the model.

    In a video model, every frame gets the positions of the image.
    """
    inner = shape[len(shape) - given.ndim :]
    return np.broadcast_to(np.asarray(resize_positions(given, inner[:-1])), shape).copy()


def _fit_structure(name: str, given: np.ndarray | None, own: np.ndarray, rules: Rules) -> _Fitted:
    """Fit structure kernels, [*window, heads, channels or 1, D]; see `_fit`."""
    outcome = None
    if given is None:
        if rules.kernels == "fresh":
            return Outcome(Action.REINITIALISED), own
        outcome = Outcome(Action.STARTED)
        given = np.ones((*[1] * (own.ndim - 3), *own.shape[-3:-1], 1), own.dtype)
    elif given.shape == own.shape:
        return Outcome(Action.KEPT), given
    elif given.ndim == own.ndim - 1:
        outcome = Outcome(Action.INFLATED, f"by {rules.inflate}")
        given = inflate(given, own.shape[0], rules.inflate)
    elif given.ndim != own.ndim:
        raise _misshapen(name, given, own)
    copies, rest = divmod(own.shape[-1], given.shape[-1])
    margins = [(n - k) / 2 for k, n in zip(given.shape[:-3], own.shape[:-3], strict=True)]
    grows = all(margin >= 0 and margin.is_integer() for margin in margins)
    channels_fit = given.shape[-2] in (1, own.shape[-2])
    if rest or not grows or not channels_fit or given.shape[-3] != own.shape[-3]:
        return Outcome(Action.REINITIALISED, f"because {given.shape} cannot become {own.shape}"), own
    if outcome is None and copies > 1:
        outcome = Outcome(Action.REPEATED, f"{given.shape[-1]} to {own.shape[-1]}")
    elif outcome is None:
        outcome = Outcome(Action.PADDED if any(margins) else Action.UNSHARED)
    padded = np.pad(given, [(int(m), int(m)) for m in margins] + [(0, 0)] * 3)
    repeated = np.repeat(np.broadcast_to(padded, (*own.shape[:-1], given.shape[-1])), copies, axis=-1)
    if name.endswith("value_kernels"):
        repeated = repeated + _noise(name, repeated.shape, copies, rules)
    return outcome, repeated


def _noise(name: str, shape: tuple[int, ...], copies: int, rules: Rules) -> np.ndarray:
    """Return noise that sums to zero over the copies of each structure kernel."""
    rng = np.random.default_rng((rules.seed, zlib.crc32(name.encode())))
    noise = rules.noise * rng.standard_normal((*shape[:-1], shape[-1] // copies, copies), np.float32)
    return (noise - noise.mean(axis=-1, keepdims=True)).reshape(shape)


def _fold_scales(source: Source, fresh: Mapping[str, jax.Array]) -> tuple[Arrays, dict[str, Outcome]]:
    """Multiply the layer scales that the model does not have into the layers before them.

    Return the arrays without these scales, and the outcomes of the scales.
    """
    arrays, outcomes = dict(source.arrays), dict[str, Outcome]()
    for name in [name for name in arrays if re.fullmatch(_SCALE, name) and name not in fresh]:
        block, _, which = name.rpartition(".")
        layer = f"{block}.mlp.fc2"
        if which == "gamma_1":
            layer = f"{block}.attn.{'proj' if f'{block}.attn.proj.kernel' in arrays else 'conv2'}"
        scale = arrays.pop(name)
        bias = arrays.get(f"{layer}.bias")
        if bias is None or bias.shape != scale.shape or f"{layer}.kernel" not in arrays:
            raise UserError(f"{source.where}: {name} has no layer of its size before it")
        for part in ("kernel", "bias"):
            arrays[f"{layer}.{part}"] = arrays[f"{layer}.{part}"] * scale
        outcomes[name] = Outcome(Action.FOLDED)
    return arrays, outcomes


class _Head(NamedTuple):
    """How to fit the head to the classes of the model."""

    order: list[int] | None  # for each class of the model, its number in the weights; None to re-initialise
    reason: str = ""  # why it is re-initialised
    notes: tuple[str, ...] = ()


def _match_classes(source: Source, names: Sequence[str] | None, classes: int) -> _Head:
    if classes != source.num_classes:
        return _Head(None, f"for {classes} classes instead of {source.num_classes}")
    if names is None:
        return _Head(list(range(classes)))
    if source.class_names is None:
        note = (
            f"warning: the head is not kept: {source.where} does not name its {classes} classes. To keep it,"
            " name them with structvit convert SOURCE DESTINATION --labels=FILE"
        )
        return _Head(None, "because the weights do not name their classes", (note,))
    if (order := class_names.match(names, source.class_names)) is not None:
        return _Head(order)
    lacking, added = class_names.difference(names, source.class_names)
    note = (
        f"warning: the head is not kept: the weights and the data have {classes} classes with different"
        f" names (only the weights have {lacking}; only the data have {added})"
    )
    return _Head(None, "for classes with other names", (note,))


def _fit_head(name: str, given: np.ndarray | None, own: np.ndarray, head: _Head) -> _Fitted:
    """Fit an array of the head or dense head to the model's order of classes; see `_fit`."""
    if head.order is None or given is None:
        return Outcome(Action.REINITIALISED, head.reason or "because the weights have none"), own
    if given.shape != own.shape:
        raise _misshapen(name, given, own)
    is_same = head.order == list(range(len(head.order)))
    return Outcome(Action.KEPT if is_same else Action.REORDERED), given[..., head.order]


def _notes(theirs: Variant, own: Variant, rules: Rules) -> list[str]:
    """Return notes about fitting weights of the variant `theirs` to a model of the variant `own`."""
    notes = []
    if own.stride != theirs.stride:
        notes.append(
            f"note: the stride is {own.stride} instead of {theirs.stride}: the weights are kept, but queries"
            " attend to other keys, so the logits differ from those of the source"
        )
    if own.structure_dim > max(theirs.structure_dim, 1) and rules.kernels == "delta" and not rules.noise:
        notes.append("warning: without noise, equal structure kernels get equal gradients and stay equal")
    return notes
