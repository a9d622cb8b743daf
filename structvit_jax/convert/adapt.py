"""Fit the weights of one model to another: what is kept, what changes its shape, what is re-initialised.

The rules keep the function where that is possible. Plain attention becomes D equal patterns, each the centre
of its window, whose joint softmax and sum are plain attention again; patterns are repeated, windows grow by
zeros. Equal patterns would get equal gradients for ever: noise that sums to zero over them sets their values
apart and leaves the output as it is.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from structvit_jax.convert.names import Arrays
from structvit_jax.convert.source import Source
from structvit_jax.models.positions import resize_positions
from structvit_jax.models.variants import Variant
from structvit_jax.utils import class_names
from structvit_jax.utils.errors import UserError

NOISE = 0.1
_SAME = ("network", "depths", "widths", "head_width", "patch", "stem", "mixer_window")  # what no rule changes
_HEAD = r"(aux_)?head\.(kernel|bias)"
_STRUCTURE = r".*\.attn\.(key|value)_kernels"
_SCALE = r".*\.gamma_[12]"


@dataclasses.dataclass(frozen=True)
class Rules:
    """How to fit weights: the section `init` of a configuration."""

    inflate: str = "average"  # kernels without time: "average" spreads them over it, "centre" takes one frame
    kernels: str = "delta"  # of StructSA where there were none: "delta" is plain attention, "fresh" is new
    noise: float = NOISE  # deviation of what tells copies of a pattern apart, in the value kernels
    seed: int = 0


class Adapted:
    """The arrays of a model, and what became of those that they were taken from."""

    def __init__(self) -> None:
        self.arrays: Arrays = {}
        self.notes: list[str] = []
        self._kinds: dict[str, list[str]] = collections.defaultdict(list)

    def put(self, kind: str, name: str, array: np.ndarray | None) -> None:
        """Takes an array; None for one that the model has no place for."""
        self._kinds[kind].append(name)
        if array is not None:
            self.arrays[name] = array

    def lines(self) -> list[str]:
        """What was done: a line a kind, and the notes."""

        def line(kind, names):
            values = sum(self.arrays[name].size for name in names if name in self.arrays)
            which = f": {', '.join(names)}" if len(names) <= 4 else ""
            return f"{kind}: {len(names)} arrays" + (f", {values:,} values" if values else "") + which

        return [line(kind, names) for kind, names in self._kinds.items()] + self.notes


def adapt(
    source: Source,
    fresh: Mapping[str, Any],
    variant: Variant,
    names: Sequence[str] | None,
    rules: Rules,
    *,
    strict: bool = False,
) -> Adapted:
    """Fit weights to a model.

    The head is kept if both name the same classes, see `structvit_jax.utils.class_names.match`, and then
    takes the model's order of them. Otherwise it is re-initialised, with a note that says why.

    Args:
      source: the weights.
      fresh: the model's own parameters and batch statistics, for what is re-initialised.
      variant: of the model.
      names: the model's class names, in order; None if its classes are those of the weights, in their order.
      rules: how.
      strict: nothing may be re-initialised or left out.

    Raises:
      UserError: weights of another network, or names that do not fit, all at once.
    """
    _check_same(source, variant)
    result, problems = Adapted(), []
    left = _fold_scales(source, fresh, result)
    fit_head = _heads(source, names, fresh, result)
    for name, own in fresh.items():
        given = left.pop(name, None)
        own = np.asarray(own)
        if re.fullmatch(_HEAD, name):
            kind, array = fit_head(name, given, own)
        elif re.fullmatch(_STRUCTURE, name):
            kind, array = _structure(name, given, own, rules)
        else:
            kind, array = _fit(name, given, own, rules)
        if array is None:
            problems.append(kind)
        elif strict and kind.startswith("re-initialised"):
            problems.append(f"{name} would be {kind}")
        else:
            result.put(kind, name, array)
    for name in left:
        if re.fullmatch(rf"aux_head.*|{_STRUCTURE}", name) and not strict:
            result.put("left out, as the model has no place for them", name, None)
        else:
            problems.append(f"extra {name}")
    if problems:
        raise UserError(f"{source.where}: {len(problems)} arrays do not fit: {'; '.join(problems)}")
    result.notes += _notes(source.variant, variant, rules)
    return result


def _check_same(source: Source, variant: Variant) -> None:
    theirs = source.variant
    same = (*_SAME, "tubelet") if theirs.video and variant.video else _SAME
    if differ := [key for key in same if getattr(theirs, key) != getattr(variant, key)]:
        what = ", ".join(f"{key} {getattr(theirs, key)} for {getattr(variant, key)}" for key in differ)
        raise UserError(
            f"{source.where} holds a {source.model['name']}, another network than the model ({what});"
            " choose a model of that size, or other weights"
        )
    if theirs.video and not variant.video:
        raise UserError(f"{source.where} holds a video model, {source.model['name']}; the model takes images")


def _fit(name: str, given: np.ndarray | None, own: np.ndarray, rules: Rules) -> tuple[str, np.ndarray | None]:
    """(what was done, the array), or (what does not fit, None)."""
    if given is None and re.fullmatch(_SCALE, name):
        return "layer scales that the weights do not have, set to one", np.ones_like(own)
    if given is None:
        return f"missing {name}", None
    if name == "pos_embed" and given.shape != own.shape:
        return "positions resized", _positions(given, own.shape)
    if given.ndim + 1 == own.ndim and given.shape == own.shape[1:]:
        return f"inflated in time ({rules.inflate})", inflate(given, own.shape[0], rules.inflate)
    if given.shape != own.shape:
        return f"misshapen {name}: {given.shape} for {own.shape}", None
    return "carried over", given


def inflate(kernel: np.ndarray, frames: int, how: str) -> np.ndarray:
    """A kernel with a window in time, [frames, *kernel.shape]: "average" spreads it evenly, as the released
    UniFormer does; "centre" puts it on the middle frame, so that a still clip gives what its image gives."""
    if how == "average":
        return np.repeat(kernel[None], frames, axis=0) / np.asarray(frames, kernel.dtype)
    inflated = np.zeros((frames, *kernel.shape), kernel.dtype)
    inflated[(frames - 1) // 2] = kernel
    return inflated


def _positions(given: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return positions for another grid, as the model itself resizes them; of images, for every frame."""
    inner = shape[len(shape) - given.ndim :]
    return np.broadcast_to(np.asarray(resize_positions(given, inner[:-1])), shape).copy()


def _structure(
    name: str, given: np.ndarray | None, own: np.ndarray, rules: Rules
) -> tuple[str, np.ndarray | None]:
    """Kernels of StructSA, [*window, heads, channels or 1, D]."""
    if given is None and rules.kernels == "fresh":
        return "re-initialised", own
    kind = "structure kernels that start as plain attention" if given is None else ""
    if given is None:
        given = np.ones((*[1] * (own.ndim - 3), *own.shape[-3:-1], 1), own.dtype)
    if given.shape == own.shape:
        return "carried over", given
    if given.ndim not in (own.ndim, own.ndim - 1):
        return f"misshapen {name}: {given.shape} for {own.shape}", None
    if given.ndim < own.ndim:
        given, kind = inflate(given, own.shape[0], rules.inflate), f"inflated in time ({rules.inflate})"
    copies, rest = divmod(own.shape[-1], given.shape[-1])
    margins = [(n - k) / 2 for k, n in zip(given.shape[:-3], own.shape[:-3], strict=True)]
    grows = all(margin >= 0 and margin.is_integer() for margin in margins)
    channels = given.shape[-2] in (1, own.shape[-2])
    if rest or not grows or not channels or given.shape[-3] != own.shape[-3]:
        return f"re-initialised, since {given.shape} cannot become {own.shape}", own
    if copies > 1 and not kind:
        kind = f"structure kernels with patterns repeated, {given.shape[-1]} to {own.shape[-1]}"
    padded = np.pad(given, [(int(m), int(m)) for m in margins] + [(0, 0)] * 3)
    repeated = np.repeat(np.broadcast_to(padded, (*own.shape[:-1], given.shape[-1])), copies, axis=-1)
    if name.endswith("value_kernels"):
        repeated = repeated + _apart(name, repeated.shape, copies, rules)
    return kind or "structure kernels in larger windows", repeated


def _apart(name: str, shape: tuple[int, ...], copies: int, rules: Rules) -> np.ndarray:
    """Noise that sums to zero over the copies of each pattern."""
    rng = np.random.default_rng((rules.seed, zlib.crc32(name.encode())))
    noise = rules.noise * rng.standard_normal((*shape[:-1], shape[-1] // copies, copies), np.float32)
    return (noise - noise.mean(axis=-1, keepdims=True)).reshape(shape)


def _fold_scales(source: Source, fresh: Mapping[str, Any], result: Adapted) -> Arrays:
    """Return the arrays, with layer scales that the model lacks multiplied into the layers before them."""
    arrays = dict(source.arrays)
    for name in [name for name in arrays if re.fullmatch(_SCALE, name) and name not in fresh]:
        block, _, which = name.rpartition(".")
        last = {"gamma_1": "attn.proj" if f"{block}.attn.proj.kernel" in arrays else "attn.conv2"}
        layer = f"{block}.{last.get(which, 'mlp.fc2')}"
        scale = arrays.pop(name)
        bias = arrays.get(f"{layer}.bias")
        if bias is None or bias.shape != scale.shape or f"{layer}.kernel" not in arrays:
            raise UserError(f"{source.where}: {name} has no layer of its size before it")
        for part in ("kernel", "bias"):
            arrays[f"{layer}.{part}"] = arrays[f"{layer}.{part}"] * scale
        result.put("layer scales multiplied into the layers before them", name, None)
    return arrays


def _heads(
    source: Source, names: Sequence[str] | None, fresh: Mapping[str, Any], result: Adapted
) -> Callable[[str, np.ndarray | None, np.ndarray], tuple[str, np.ndarray | None]]:
    """Return what fits head and dense head: carried over by class name, in the model's order."""
    classes = np.asarray(fresh["head.bias"]).size if "head.bias" in fresh else 0
    order, why = _class_order(source, names, classes, result)

    def fit(name, given, own):
        if order is None or given is None:
            return f"re-initialised, {why or 'as the weights have none'}", own
        if given.shape != own.shape:
            return f"misshapen {name}: {given.shape} for {own.shape}", None
        same = order == list(range(classes))
        return "carried over" if same else "reordered by class name", given[..., order]

    return fit


def _class_order(
    source: Source, names: Sequence[str] | None, classes: int, result: Adapted
) -> tuple[list[int] | None, str]:
    """Return the weights' number of each of the model's classes; or None, and why the head is not kept."""
    if classes != source.num_classes:
        return None, f"for {classes} classes instead of {source.num_classes}"
    if names is None:
        return list(range(classes)), ""
    if source.class_names is None:
        result.notes.append(
            f"warning: the head is not kept: {source.where} does not name its {classes} classes. To keep it,"
            " name them with structvit convert SOURCE DESTINATION --labels=FILE"
        )
        return None, "as the weights do not name their classes"
    order = class_names.match(names, source.class_names)
    if order is None:
        lacking, added = class_names.difference(names, source.class_names)
        result.notes.append(
            f"warning: the head is not kept: the weights have {classes} classes of other names than the data"
            f" (only the weights have {lacking}; only the data have {added})"
        )
    return order, "for classes of other names"


def _notes(theirs: Variant, ours: Variant, rules: Rules) -> list[str]:
    notes = []
    if ours.stride != theirs.stride:
        notes.append(
            f"note: stride {ours.stride} for {theirs.stride}: the weights are kept, but a query sees other"
            " keys, so the logits are not those of the source"
        )
    if ours.structure_dim > max(theirs.structure_dim, 1) and rules.kernels == "delta" and not rules.noise:
        notes.append("warning: without noise the copies of a pattern get equal gradients, and stay equal")
    return notes
