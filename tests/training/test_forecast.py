"""The estimated duration of a run before its first step."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax.config import default_config
from structvit_jax.data.stages import STAGES
from structvit_jax.runtime import mesh
from structvit_jax.training import forecast
from structvit_jax.training.forecast import Forecast

READING = {"seconds": dict.fromkeys(STAGES, 0.1)}  # 0.6 s of one reader


def test_a_trial_leaves_the_state_as_it_is():
    grid = mesh.make_mesh(2, 1, jax.devices()[:2])
    state = jax.device_put({"weights": jnp.arange(4.0)}, mesh.replicated(grid))
    config = default_config()
    config.data.batch_size = 8
    learner = types.SimpleNamespace(config=config, mesh=grid, row={"labels": ((), np.int32)})
    batch = {"labels": np.zeros(8, np.int32), "mask": np.ones(8, bool), "index": np.zeros(8, np.int32)}

    def step(state, batch):
        return {"weights": state["weights"] + 1}, batch["labels"].sum()

    compiled = jax.jit(step, donate_argnums=0).lower(state, mesh.put_batch(grid, batch)).compile()
    line = Forecast(learner, compiled, state, 10**6).describe(READING)
    assert line.startswith("about ") and ": 1,000,000 steps of " in line
    assert np.asarray(state["weights"]).tolist() == [0, 1, 2, 3]
    compiled(state, mesh.put_batch(grid, batch))
    assert state["weights"].is_deleted()  # so a trial on the state itself would have been noticed


def make(monkeypatch, steps, step_seconds, *, workers=0, platform="cpu"):
    monkeypatch.setattr(forecast, "_trial", lambda *given: step_seconds)
    monkeypatch.setattr(forecast, "_fits_twice", lambda *given: True)
    monkeypatch.setattr(forecast, "available_cores", lambda: 8)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    config = default_config()
    config.data.workers = workers
    return Forecast(types.SimpleNamespace(config=config), None, None, steps).describe(READING)


@pytest.mark.parametrize(
    ("steps", "step_seconds", "options", "line"),
    [
        (3000, 0.449, {"workers": 6}, "about 27 minutes: 3,000 steps of 0.45 s (reading a batch: 0.1 s)"),
        (3000, 0.449, {}, "about 37 minutes: 3,000 steps of 0.45 s (reading a batch: 0.3 s)"),
        (90_000, 0.02, {"platform": "gpu"}, "about 8 hours: 90,000 steps of 0.02 s (reading a batch: 0.3 s)"),
        (50, 2, {"platform": "gpu"}, "about 100 seconds: 50 steps of 2 s (reading a batch: 0.3 s)"),
        (90_000, 2, {"workers": 99}, "about 2 days: 90,000 steps of 2 s (reading a batch: 0.075 s)"),
    ],
)
def test_reading_and_steps_share_the_cores_only_on_a_cpu(monkeypatch, steps, step_seconds, options, line):
    assert make(monkeypatch, steps, step_seconds, **options) == f"{line}, without evaluations"


def test_short_runs_have_no_trial(monkeypatch):
    assert make(monkeypatch, 49, 1) is None


@pytest.mark.parametrize(("limit", "fits"), [(None, True), (1999, False), (2300, True)])
def test_a_second_state_needs_memory(monkeypatch, limit, fits):
    device = types.SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})
    monkeypatch.setattr(forecast.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(forecast, "memory_of", lambda compiled: 1000)
    assert forecast._fits_twice(None, {"weights": jnp.ones(250)}) == fits
