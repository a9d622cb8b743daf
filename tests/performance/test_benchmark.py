"""`structvit bench model`: parts equal to the model's and PyTorch's, lower bounds, files."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from structvit_jax import cost, create_model
from structvit_jax.performance import bench
from structvit_jax.performance.bench import parts, summary, timing
from structvit_jax.performance.bench.peer import TorchPeer
from structvit_jax.utils.errors import UserError

NAME, SHAPE = "structvit_tiny_3_2_video", (2, 4, 40, 32, 3)
TINY = [
    "--config=bench:structvit_tiny_4_1",
    "--config.data.name=noise:5",
    "--config.data.size=32",
    "--config.data.batch_size=2",
    "--rounds=2",
]


@pytest.fixture(scope="module")
def model():
    return create_model(NAME, num_classes=5)


def test_calls_alternate():
    """Each measurement follows a warm-up; the first one only determines the repeats."""
    order = []

    def call(name):
        return timing.Call(lambda: (order.append(name), time.sleep(timing._MIN_SECONDS)), lambda _: None)

    times = timing.alternate({name: call(name) for name in "ab"}, 3)
    assert "".join(order) == "aabb" + "aabb" * 3
    assert all(len(t.rounds) == 3 and t.median >= timing._MIN_SECONDS for t in times.values())


def test_short_calls_repeat(monkeypatch):
    """A call of a millisecond, by a clock that does not depend on the load, runs for a tenth of a second."""
    ran = []
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-3 * len(ran))
    timing.alternate({"": timing.Call(lambda: ran.append(None), lambda _: None)}, 1)
    assert len(ran) == pytest.approx(2 + 1 + 100, abs=1)


def test_medians_and_ratios():
    ours, theirs = timing.Times((1.0, 4.0, 2.0)), timing.Times((3.0, 4.0, 5.0))
    assert ours.median == 2.0 and ours.spread == "-50% +100%"
    assert theirs.ratio_to(ours) == 2.5  # of 3, 1 and 2.5
    row = summary.Row("x", "forward", ours, 10.0, 8.0, {"slow": timing.Times((9.0,) * 3), "fast": theirs})
    assert (row.fastest_peer, row.speedup) == ("fast", 2.5)
    rates = timing.Rates(operations=10.0, bytes=16.0)
    assert row.floors(rates) == (1.0, 0.5) and row.efficiency(rates) == 0.5


@pytest.mark.parametrize(
    ("name", "shape"),
    [(NAME, SHAPE), ("structvit_tiny_4_1", (2, 32, 48, 3)), ("deit_tiny_video", (1, 8, 24, 24, 3))],
)
def test_parts_make_up_the_model(name, shape):
    model = create_model(name, num_classes=5)
    found = list(parts.parts_of(model, shape))
    counted = cost(name, shape[1:], 5)
    blocks = shape[0] * (counted.macs - counted.parts["head"].macs)
    whole = sum(part.calls_per_step * part.lower_bounds()["forward"][0] for part in found if not part.inner)
    assert 0.9 * 2 * blocks < whole <= 2 * blocks  # zeros around convolutions are not multiplied
    by_name = {part.name: part for part in found}
    for part in found:
        if part.inner:
            outer = by_name[part.name.rpartition(".")[0]]
            assert (
                part.calls_per_step * part.lower_bounds()["forward"][0]
                <= outer.calls_per_step * outer.lower_bounds()["forward"][0]
            )


def test_floors_by_hand(model):
    by_name = {part.name: part for part in parts.parts_of(model, SHAPE)}
    bounds = by_name["blocks2.position.depthwise"].lower_bounds()
    assert by_name["blocks2.position.depthwise"].shapes == [(2, 2, 10, 8, 32)]
    values, weights = 2 * 2 * 10 * 8 * 32, (27 + 1) * 32
    assert bounds["forward"][1] == 4 * (2 * values + weights)
    assert bounds["train"][1] == 4 * (5 * values + 3 * weights)
    taps = math.prod(3 * n - 2 for n in (2, 10, 8)) * 2 * 32  # those that see the grid
    assert bounds["forward"][0] == 2 * taps and bounds["train"][0] == 6 * taps


def test_parts_are_pytorchs(model):
    """Compare the outputs, and the gradients of the inputs."""
    peer = TorchPeer(model)
    kinds = ("patch_embed1", "blocks1", "blocks3")
    for part in (part for part in parts.parts_of(model, SHAPE) if part.name.partition(".")[0] in kinds):
        inputs, cotangent = part.inputs(), jnp.ones(part.output.shape)
        output, (_, gradients) = jax.jit(part.gradients)(part.weights, inputs, cotangent)
        gradients = map(np.asarray, gradients)  # transposed by NumPy, which compiles nothing
        ours = [_as_torch(part, np.asarray(output)), *(_as_torch_input(part, x) for x in gradients)]
        forward, backward = peer.part(part, backward=False), peer.part(part, backward=True)
        assert list(forward) == list(backward) == ["contiguous", "channels last"]
        for variant in forward:
            theirs = [forward[variant].run(), *backward[variant].run()[: len(inputs)]]
            for a, b in zip(ours, theirs, strict=True):
                scale = max(float(b.abs().max()), 0.01)  # of what is zero but for rounding
                assert np.abs(a - b.numpy()).max() < 1e-4 * scale, (part.name, variant)


def _as_torch(part, x):
    """Return an output in the layout of the PyTorch file."""
    if part.name.endswith("patterns"):
        return np.moveaxis(x, -2, 1).reshape(x.shape[0], x.shape[-2], -1, x.shape[-1])
    return np.swapaxes(x, 1, 2) if part.name.endswith("attend") else np.moveaxis(x, -1, 1)


def _as_torch_input(part, x):
    if part.name.endswith("patterns"):
        return x.reshape(x.shape[0], -1, x.shape[-2] * x.shape[-1])
    return _as_torch(part, x)


def test_the_legend_names_what_is_drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    times, rates = timing.Times((1.0, 2.0)), timing.Rates(operations=10.0, bytes=16.0)
    for peers in ({}, {"compiled": times}):
        summary.plot([summary.Row("blocks1", "forward", times, 10.0, 8.0, peers)], rates, "")
    alone, beside = ({text.get_text() for text in f.axes[0].get_legend().get_texts()} for f in figures)
    assert alone == {"structvit_jax", "floor"} and beside == alone | {"PyTorch's best"}


def test_the_command(command, tmp_path):
    eager = {"TORCHDYNAMO_DISABLE": "1"}  # torch.compile takes minutes
    chosen = "--only=model, blocks3.mixer", "--config.model.depths=(1,1,1,1)", f"--workdir={tmp_path}"
    done = command(*TINY, *chosen, "--peer=torch", program="bench model", **eager)
    assert done.returncode == 0, done.stderr
    assert "logits differ from PyTorch (channels last) by " in done.stdout
    assert "structvit_tiny_4_1 train: " in done.stdout and "times as fast" in done.stdout
    assert "channels last" in done.stdout and "ms, compiled" not in done.stdout  # it was switched off
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(row["name"], row["phase"]): row for row in found["rows"]}
    names = ("structvit_tiny_4_1", "blocks3.mixer")
    assert set(rows) == {(name, phase) for name in names for phase in ("forward", "train")}
    for row in rows.values():
        assert len(row["ours"]["rounds"]) == 2 and min(row["ours"]["rounds"]) > 0
        assert {"contiguous", "channels last"} <= set(row["peers"])
    assert min(found["rates"].values()) > 1e8
    lines = (tmp_path / "bench.md").read_text().splitlines()
    assert sum(line.startswith("| structvit_tiny_4_1, ") for line in lines) == 2
    assert sum(line.startswith("| blocks3.") for line in lines) == 2
    columns = [line.count("|") for line in lines if line.startswith("|")]
    assert columns == [10] * 4 + [10] * 4
    assert ", first call | " in lines[2]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=block3.*"], "--only: no part is named 'block3.*'; the parts are model, "),
        (["--config.model.name=deit_tiny", "--peer=torch"], "only UniFormers and StructViTs"),
        (
            ["--config.model.aggregation=element", "--peer=torch"],
            "torch.py does not implement this model",
        ),
        (["--rounds=0"], "0 is not in the range x>=1"),
        (["--peer=torhc"], "'torhc' is not 'torch'"),
        (["--onyl=model"], "No such option '--onyl'. Did you mean '--only'?"),
    ],
)
def test_user_errors_are_one_line(command, tmp_path, arguments, message):
    done = command(*TINY, *arguments, f"--workdir={tmp_path}", program="bench model")
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_logits_that_differ_are_an_error():
    ours, theirs = (timing.Call(lambda x=x: x) for x in (jnp.ones((2, 5)), torch.full((2, 5), 1.01)))
    with pytest.raises(UserError, match=r"differ from PyTorch \(eager\) by 0.0099 of the largest logit"):
        bench._check_logits(ours, {"eager": theirs}, "float32")


def test_several_devices_are_refused(tmp_path):
    assert jax.device_count() > 1, "conftest.py makes eight"
    with pytest.raises(UserError, match="measures one device"):
        bench.run(None, None, tmp_path)
