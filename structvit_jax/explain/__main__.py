"""Show what a model's attention reads in an image or a video.

    python -m structvit_jax.explain --checkpoint=RUN FILE [--query=T,Y,X] [--layer=NAME] [--head=N]
        [--nosmooth] [--animate=gif|mp4] [--beside=RUN,RUN] [--out=DIR] [--config.section.key=value ...]

Writes two files into DIR. explained.png shows one query, a position of the input, in one layer and head: its
correlations with all positions, the attention of each of the D structure kernels beside the kernels that make
it, and the final map, the weight with which each value counts. explained.html is a self-contained page on
which any query, layer and head can be selected, with the models of --beside next to it. Maps lie over the
frames as they were recorded, each with its own scale. --animate=gif or mp4 also writes the maps of the
picture as an animation.

FILE is an image, a video, a folder of frames, or test:N, example N of the run's test data.

Without --layer, --head or --query, those with the highest score are selected: (effective rank - 1) / (D - 1),
or 1 if D < 2, times 4 h (1 - h), where h is the attention's entropy divided by its maximum, log(D keys). The
effective rank counts how many different dynamic kernels a query uses; the second factor is 0 for attention
that is even or at a single key. Candidates are all heads of the layers whose frames have at least 3 x 3
positions, and up to 6 of the most textured positions of the middle frame. --query counts frames and pixels as
the model sees them (Y,X of an image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epath

from structvit_jax.command import checkpoint_and_paths, run_command
from structvit_jax.data.reader import Crop
from structvit_jax.errors import DecodeError, UserError, known, printable
from structvit_jax.explain import animation, overlay, page, picture
from structvit_jax.explain.choice import SCORE, choose
from structvit_jax.explain.layout import Line
from structvit_jax.explain.maps import Layer, Query, layers, position_of, query_maps
from structvit_jax.paths import parse_path, writing
from structvit_jax.trained import Trained, load_trained
from structvit_jax.training.commit import FOLDER
from structvit_jax.training.storage import write

_QUERY = flags.DEFINE_list("query", None, "Frame, row and column of the position that is explained.")
_LAYER = flags.DEFINE_string("layer", None, "The attention block of the picture, as blocks3.0.")
_HEAD = flags.DEFINE_integer("head", None, "The head of the picture.", lower_bound=0)
_SMOOTH = flags.DEFINE_bool("smooth", True, "Interpolate maps between positions, or draw cells (--nosmooth).")
_ANIMATE = flags.DEFINE_enum("animate", None, list(animation.FORMATS), "Also write an animation of a video.")
_BESIDE = flags.DEFINE_list("beside", [], "Checkpoints of other models for the page.")
_OUT = flags.DEFINE_string("out", ".", "Folder for the picture and the page.")


class Explained(NamedTuple):
    """A model and what it makes of one input."""

    trained: Trained
    pixels: np.ndarray  # uint8 [[time,] height, width, 3], RGB, as the model saw it
    frames: np.ndarray  # uint8 [time, height, width, 3], RGB, as recorded
    crop: Crop  # of the frames, what the model saw
    layers: Mapping[str, Layer]
    best: Sequence[tuple[str, float]]  # the most probable classes
    true_class: str  # "" if unknown

    @property
    def title(self) -> str:
        run, _, step = self.trained.where.rpartition(f"/{FOLDER}/")
        return printable(f"{self.trained.config.model.name}, {run}, step {step}")

    @property
    def predicted(self) -> str:
        return ", ".join(f"{printable(name)} {share:.3f}" for name, share in self.best)

    @property
    def right(self) -> bool | None:
        """Whether the most probable class is the true one; None if that is unknown."""
        return self.best[0][0] == self.true_class if self.true_class else None

    @property
    def verdict(self) -> str:
        if not self.true_class:
            return "true class: unknown"
        return f"true class: {printable(self.true_class)}, {'right' if self.right else 'wrong'}"


def main(argv: list[str]) -> None:
    checkpoint, config, paths = checkpoint_and_paths(argv, "FILE")
    if len(paths) > 1:
        raise UserError(f"it explains one file, not {len(paths)}: {', '.join(map(printable, paths))}")
    if _ANIMATE.value and config.data.frames == 0:
        raise UserError("--animate needs a model for videos; this one takes images")
    out = parse_path(_OUT.value)
    first, *others = (
        _explained(trained, paths[0])
        for trained in (load_trained(checkpoint, config), *map(load_trained, _BESIDE.value))
    )
    layer = known("layer", _LAYER.value, first.layers) if _LAYER.value else None
    point = _asked(first.pixels, _QUERY.value) if _QUERY.value else None
    choice = choose(first.layers, first.pixels, layer=layer, head=_HEAD.value, point=point)
    one = first.layers[choice.layer]
    query = query_maps(one, choice.head, position_of(one, choice.point))
    frames, crops = overlay.trimmed(first.frames, [model.crop for model in (first, *others)])
    html = page.build(
        [
            page.Shown(model.title, model.predicted, model.layers, model.verdict, model.right, crop)
            for model, crop in zip((first, *others), crops, strict=True)
        ],
        frames,
        video=first.pixels.ndim == 4,
        title=f"What attention reads in {printable(paths[0])}",
        layer=choice.layer,
        head=choice.head,
        point=choice.point,
        smooth=_SMOOTH.value,
    )
    heading = _heading(printable(paths[0]), first, one, query, choice.head)
    drawn = picture.draw(frames, crops[0], one, query, choice.head, heading, smooth=_SMOOTH.value)
    files: dict[str, str | bytes] = {"explained.png": drawn, "explained.html": html}
    if _ANIMATE.value:
        moving = animation.draw(
            frames, crops[0], one, query, choice.head, _ANIMATE.value, smooth=_SMOOTH.value
        )
        files[f"explained.{_ANIMATE.value}"] = moving
    _save(out, files)
    where = ",".join(str(int(share * side)) for share, side in _sides(choice.point, first.pixels))
    print(f"{first.predicted}\n{first.verdict}")
    print(f"layer {choice.layer}, head {choice.head}, query {where}")
    for name in files:
        print(printable(str(out / name)))


def _save(folder: epath.Path, files: Mapping[str, str | bytes]) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(folder / name, content)


def _heading(name: str, model: Explained, layer: Layer, query: Query, head: int) -> list[Line]:
    """The text above the picture."""
    mark, colour = {None: ("", "#5a5a5a"), True: (" ✓", "#1b7837"), False: (" ✗", "#b2182b")}[model.right]
    grid = " × ".join(map(str, layer.grid))
    given = {"layer": _LAYER.value, "head": _HEAD.value, "query": _QUERY.value}
    free = [name for name, value in given.items() if value is None]
    chosen = f"Selected by the highest score ({', '.join(free)}): {SCORE}. " if free else ""
    drawn = "with interpolation between positions" if _SMOOTH.value else "as one cell per position"
    return [
        Line(name, 12, "bold"),
        Line(f"predicted: {model.predicted}", 10),
        Line(model.verdict + mark, 10, "bold", colour),
        Line(model.title),
        Line(
            f"{layer.name} ({layer.kind}), grid {grid}, head {head} of {layer.attention.heads};"
            f" effective rank of the dynamic kernels {query.rank:.2f} of {layer.patterns}"
        ),
        Line(
            f"{chosen}Each map has its own colour scale: {overlay.SCALES}. Maps are averaged over channels"
            f" and drawn {drawn}.",
            8,
            colour="#5a5a5a",
        ),
    ]


def _explained(trained: Trained, path: str) -> Explained:
    """Raises UserError: a file that cannot be read."""
    try:
        example = trained.example(path)
    except DecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    view = example.views[trained.reader.middle]
    found = layers(trained.network, trained.normalized(view[None]))
    best = trained.prediction(path, trained.scores(example.views)).best(3)
    pixels = view[..., ::-1] if trained.config.data.channels == "bgr" else view
    return Explained(trained, pixels, example.frames, example.crop, found, best, example.true_class)


def _sides(point: Sequence[float], pixels: np.ndarray) -> list[tuple[float, int]]:
    return list(zip(point, pixels.shape[:-1], strict=True))


def _asked(pixels: np.ndarray, words: Sequence[str]) -> tuple[float, ...]:
    """--query as fractions of the input's sides."""
    sides = pixels.shape[:-1]
    try:
        place = [float(word) for word in words]
    except ValueError:
        place = []
    if len(place) != len(sides) or not all(0 <= at < side for at, side in zip(place, sides, strict=True)):
        names = "T,Y,X" if len(sides) == 3 else "Y,X"
        most = ",".join(str(side - 1) for side in sides)
        raise UserError(f"--query={printable(','.join(words))} should be {names}, from 0 to {most}")
    return tuple(min((at + 0.5) / side, 1 - 1e-9) for at, side in zip(place, sides, strict=True))


if __name__ == "__main__":
    run_command(main)
