"""Explain an image or a video: write the picture, the page and the animation of `structvit explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from structvit_jax.analysis.explain import animation, overlay, page, picture
from structvit_jax.analysis.explain.choice import SCORE, choose
from structvit_jax.analysis.explain.drawing import Drawing
from structvit_jax.analysis.explain.maps import layers, position_of, query_maps
from structvit_jax.analysis.explain.page import ModelView
from structvit_jax.analysis.explain.page_layout import Line
from structvit_jax.inference.trained import TrainedModel, load_trained
from structvit_jax.runtime.storage import write
from structvit_jax.training.checkpoint import FOLDER
from structvit_jax.utils.errors import DecodeError, UserError, check_choice, printable
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

_GREY = "#5a5a5a"
_VERDICTS = {None: ("", _GREY), True: (" ✓", "#1b7837"), False: (" ✗", "#b2182b")}  # mark and colour


class Request(NamedTuple):
    """The arguments of `structvit explain`."""

    path: str
    query: Sequence[str] | None = None  # frame, row and column of a position of the input
    layer: str | None = None
    head: int | None = None
    smooth: bool = True  # interpolate maps between positions
    animate: str | None = None  # a kind of `animation.ENCODERS`
    beside: Sequence[str] = ()  # checkpoints of other models for the page
    out: str = "."


class _Explained(NamedTuple):
    """A model, and the input as it was recorded and as the model saw it."""

    view: ModelView
    pixels: np.ndarray  # uint8 [[time,] height, width, 3], RGB, as the model saw it
    frames: np.ndarray  # uint8 [time, height, width, 3], RGB, as recorded


def explain(checkpoint: str, config: ml_collections.ConfigDict, request: Request) -> None:
    """Write the files of an explanation; print the prediction, the selected query and the paths.

    Raises:
      UserError: a file that cannot be read or written, or an unknown layer, head or query.
    """
    if request.animate and config.data.frames == 0:
        raise UserError("--animate needs a model for videos; this one takes images")
    out = parse_path(request.out)
    models = [_explain(load_trained(checkpoint, config), request.path)]
    models += [_explain(load_trained(other), request.path) for other in request.beside]
    frames, crops = overlay.trimmed(models[0].frames, [model.view.crop for model in models])
    views = [model.view._replace(crop=crop) for model, crop in zip(models, crops, strict=True)]
    view, pixels = views[0], models[0].pixels

    layer = check_choice("layer", request.layer, view.layers) if request.layer else None
    point = _parse_query(request.query, pixels.shape[:-1]) if request.query else None
    choice = choose(view.layers, pixels, layer=layer, head=request.head, point=point)
    selected = view.layers[choice.layer]
    query = query_maps(selected, choice.head, position_of(selected, choice.point))
    drawing = Drawing(frames, view.crop, selected, query, request.smooth)

    title = f"What attention reads in {printable(request.path)}"
    files: dict[str, str | bytes] = {
        "explained.png": picture.draw(drawing, _heading(request, view, drawing)),
        "explained.html": page.build(views, frames, choice, title=title, smooth=request.smooth),
    }
    if request.animate:
        files[f"explained.{request.animate}"] = animation.draw(drawing, request.animate)
    with write_errors_as_user_error(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(out / name, content)

    where = (str(int(at * side)) for at, side in zip(choice.point, pixels.shape[:-1], strict=True))
    print(f"{view.predicted}\n{view.verdict}")
    print(f"layer {choice.layer}, head {choice.head}, query {','.join(where)}")
    for name in files:
        print(printable(str(out / name)))


def _explain(trained: TrainedModel, path: str) -> _Explained:
    """Predict the class of a file and compute the inputs of all attention layers.

    Raises:
      UserError: a file that cannot be read.
    """
    try:
        example = trained.example(path)
    except DecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    pixels = example.views[trained.reader.middle]
    inputs = layers(trained.network, trained.normalized(pixels[None]))
    if trained.config.data.channels == "bgr":
        pixels = pixels[..., ::-1]

    best = trained.prediction(path, trained.scores(example.views)).best(3)
    predicted = ", ".join(f"{printable(name)} {probability:.3f}" for name, probability in best)
    is_right, verdict = None, "true class: unknown"
    if example.true_class:
        is_right = best[0][0] == example.true_class
        verdict = f"true class: {printable(example.true_class)}, {'right' if is_right else 'wrong'}"
    run, _, step = trained.where.rpartition(f"/{FOLDER}/")
    title = printable(f"{trained.config.model.name}, {run}, step {step}")
    view = ModelView(title, predicted, verdict, is_right, inputs, example.crop)
    return _Explained(view, pixels, example.frames)


def _parse_query(query: Sequence[str], sides: Sequence[int]) -> tuple[float, ...]:
    """Return the pixel of --query in fractions of the input's sides.

    Raises:
      UserError: it is not a pixel of the input.
    """
    try:
        pixel = [float(word) for word in query]
    except ValueError:
        pixel = []
    if len(pixel) != len(sides) or not all(0 <= at < side for at, side in zip(pixel, sides, strict=True)):
        names, largest = "T,Y,X"[-2 * len(sides) + 1 :], ",".join(str(side - 1) for side in sides)
        raise UserError(f"--query={printable(','.join(query))} should be {names}, from 0 to {largest}")
    return tuple(min((at + 0.5) / side, 1 - 1e-9) for at, side in zip(pixel, sides, strict=True))


def _heading(request: Request, view: ModelView, drawing: Drawing) -> list[Line]:
    """Return the text above the picture."""
    mark, colour = _VERDICTS[view.is_right]
    layer, query = drawing.layer, drawing.query
    options: Mapping[str, object] = {name: getattr(request, name) for name in ("layer", "head", "query")}
    free = [name for name, value in options.items() if value is None]
    selection = f"Selected by the highest score ({', '.join(free)}): {SCORE}. " if free else ""
    how = "with interpolation between positions" if request.smooth else "as one cell per position"
    return [
        Line(printable(request.path), 12, "bold"),
        Line(f"predicted: {view.predicted}", 10),
        Line(view.verdict + mark, 10, "bold", colour),
        Line(view.title),
        Line(
            f"{layer.name} ({layer.kind}), grid {' × '.join(map(str, layer.grid))}, head {query.head} of"
            f" {layer.attention.heads}; effective rank of the dynamic kernels {query.rank:.2f} of"
            f" {layer.structure_dim}"
        ),
        Line(
            f"{selection}Each map has its own colour scale: {overlay.SCALES}. Maps are averaged over channels"
            f" and drawn {how}.",
            8,
            colour=_GREY,
        ),
    ]
