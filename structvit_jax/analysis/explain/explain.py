"""Explain an image or a video: the picture, the page and the animation of `structvit explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath

from structvit_jax.analysis.explain import animation, overlay, page, picture
from structvit_jax.analysis.explain.choice import SCORE, choose
from structvit_jax.analysis.explain.layout import Line
from structvit_jax.analysis.explain.maps import Layer, Query, layers, position_of, query_maps
from structvit_jax.data.reader import Crop
from structvit_jax.inference.trained import TrainedModel, load_trained
from structvit_jax.runtime.storage import write
from structvit_jax.training.commit import FOLDER
from structvit_jax.utils.errors import DecodeError, UserError, check_choice, printable
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error


class Request(NamedTuple):
    """What to explain; see `structvit explain`."""

    path: str
    query: Sequence[str] | None = None  # frame, row and column of a position of the input
    layer: str | None = None
    head: int | None = None
    smooth: bool = True  # interpolate maps between positions
    animate: str | None = None  # a format of `animation`
    beside: Sequence[str] = ()  # checkpoints of other models for the page
    out: str = "."


class Explained(NamedTuple):
    """A model and what it makes of one input."""

    trained: TrainedModel
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


def run(checkpoint: str, config: ml_collections.ConfigDict, request: Request) -> None:
    """Write the files of an explanation and print what they show.

    Raises:
      UserError: a file that cannot be read, or a layer, head or query that does not exist.
    """
    if request.animate and config.data.frames == 0:
        raise UserError("--animate needs a model for videos; this one takes images")
    out = parse_path(request.out)
    first, *others = (
        _explained(trained, request.path)
        for trained in (load_trained(checkpoint, config), *map(load_trained, request.beside))
    )
    layer = check_choice("layer", request.layer, first.layers) if request.layer else None
    point = _asked(first.pixels, request.query) if request.query else None
    choice = choose(first.layers, first.pixels, layer=layer, head=request.head, point=point)
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
        title=f"What attention reads in {printable(request.path)}",
        layer=choice.layer,
        head=choice.head,
        point=choice.point,
        smooth=request.smooth,
    )
    heading = _heading(request, first, one, query, choice.head)
    drawn = picture.draw(frames, crops[0], one, query, choice.head, heading, smooth=request.smooth)
    files: dict[str, str | bytes] = {"explained.png": drawn, "explained.html": html}
    if request.animate:
        moving = animation.draw(
            frames, crops[0], one, query, choice.head, request.animate, smooth=request.smooth
        )
        files[f"explained.{request.animate}"] = moving
    _save(out, files)
    where = ",".join(str(int(share * side)) for share, side in _sides(choice.point, first.pixels))
    print(f"{first.predicted}\n{first.verdict}")
    print(f"layer {choice.layer}, head {choice.head}, query {where}")
    for name in files:
        print(printable(str(out / name)))


def _save(folder: epath.Path, files: Mapping[str, str | bytes]) -> None:
    with write_errors_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(folder / name, content)


def _heading(request: Request, model: Explained, layer: Layer, query: Query, head: int) -> list[Line]:
    """The text above the picture."""
    mark, colour = {None: ("", "#5a5a5a"), True: (" ✓", "#1b7837"), False: (" ✗", "#b2182b")}[model.right]
    grid = " × ".join(map(str, layer.grid))
    given = {"layer": request.layer, "head": request.head, "query": request.query}
    free = [name for name, value in given.items() if value is None]
    chosen = f"Selected by the highest score ({', '.join(free)}): {SCORE}. " if free else ""
    drawn = "with interpolation between positions" if request.smooth else "as one cell per position"
    return [
        Line(printable(request.path), 12, "bold"),
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


def _explained(trained: TrainedModel, path: str) -> Explained:
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
