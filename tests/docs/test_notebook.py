"""The notebook docs/tour.ipynb runs, wherever it is opened."""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from small import SMALL

SHORT = """
config.train.duration = "2 steps"
config.optimizer.warmup = "0 steps"
config.data.batch_size = 8
config.data.train_examples = config.data.test_examples = 64
"""


def code_cells():
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(params=["docs", "."])
def clone(request, tmp_path, monkeypatch):
    """A clone whose notebook is opened in docs/, as in Jupyter, or at the root."""
    (tmp_path / "docs").mkdir()
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path / request.param)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("configs", "motion")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_the_configurations_are_found(clone):
    exec(code_cells()[0], {})
    assert importlib.import_module("configs.moving_digits").__file__.startswith(str(clone))


@pytest.mark.parametrize("clone", ["docs"], indirect=True)
def test_all_cells_run(clone, monkeypatch, caplog):
    """One after another, with a short training of a small model."""
    shown = []
    display = types.SimpleNamespace(Image=len, display=shown.append)
    shell = types.SimpleNamespace(display=display, version_info=(9, 0), get_ipython=lambda: None)
    monkeypatch.setitem(sys.modules, "IPython", shell)  # matplotlib asks it, too
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    small = "".join(f"{word.removeprefix('--')}\n" for word in SMALL)
    names = {}
    for code in code_cells():
        code = code.replace("digits(200)", "digits(8)")
        exec(code.replace('config.train.duration = "200 steps"\n', SHORT + small), names)
    assert not [record for record in caplog.records if record.name == "absl"]
    assert (clone / "runs" / "notebook" / "result.json").exists()
    assert names["result"]["step"] == 2 and len(shown) == 2 and min(shown) > 10_000
    difference = np.abs(names["output"] - names["whole"][0][names["query"].position][0]).max()
    assert difference <= 1e-5 * np.abs(names["output"]).max()
