"""The documents are true: README blocks run, configurations build, names in FIDELITY.md exist."""

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from conftest import COMPILER, ROOT

from structvit_jax import convert, create_model, data
from structvit_jax.cli import show
from structvit_jax.config import automatic, check_config, recipes
from structvit_jax.data.dataset import BUILT_IN
from structvit_jax.models import weights

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CONFIGS = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.py"))}
CONFIGS |= {f"README block {i}": body for i, (_, kind, body) in enumerate(BLOCKS) if kind == "config"}
# What makes a training command of the README short enough for a test.
SHORT = [
    "--config.train.duration=2 steps",
    "--config.optimizer.warmup=0 steps",
    "--config.data.batch_size=8",
    "--config.data.train_examples=64",
    "--config.data.test_examples=64",
]
# And a structvit_tiny quick to compile.
SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.widths=(8,8,16,16)",
    "--config.model.head_width=8",
]


def commands():
    bodies = [body for language, kind, body in BLOCKS if (language, kind) == ("bash", "run")]
    return [line for line in "".join(bodies).splitlines() if not line.startswith("make ")]


def test_the_first_block_is_make():
    assert BLOCKS[0] == ("bash", "run", "make run\nmake test\n")


def test_make_run_and_what_uses_its_checkpoint(command, tmp_path):
    """In the environment that runs the tests, with the installing step taken as done."""
    tmp_path = tmp_path / "moving_digits"
    arguments = shlex.join([*SHORT, *SMALL, f"--workdir={tmp_path}"])
    make = ["make", f"--assume-old={sys.prefix}/.installed-cpu", "run", f"VENV={sys.prefix}"]
    words, environment = [*make, "ACCELERATOR=cpu", f"ARGS={arguments}"], os.environ | {"XLA_FLAGS": COMPILER}
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "result: top1" in process.stdout
    assert (tmp_path / "result.json").exists()

    (lines,) = [body for language, kind, body in BLOCKS if kind == "use"]
    for line in lines.splitlines():
        _, _, module, *words = shlex.split(line.replace("runs/moving_digits", str(tmp_path)))
        module += ".__main__" if (ROOT / module.replace(".", "/")).is_dir() else ""
        done = command(*words, module=module)
        assert done.returncode == 0, done.stderr
        assert str(tmp_path) in done.stdout or "test:2: " in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"explained.png", "explained.html", "report.html", "model.jax", "model.jax.json"}
    (code,) = [body for language, kind, body in BLOCKS if kind == "trained"]
    exec(code.replace("runs/moving_digits", str(tmp_path)).replace("(2, 1, 1)", "(1, 0, 2)"), {})


def test_the_commands(command, tmp_path):
    ran = 0
    for line in commands():
        assert line.startswith("python -m structvit_jax.main")
        arguments = [word for word in shlex.split(line)[3:] if not word.startswith("--workdir")]
        name = re.search(r"configs/(\w+)", line)[1]
        small = [] if "deit" in line else SMALL
        process = command(*arguments, *SHORT, *small, f"--workdir={tmp_path / name}")
        assert process.returncode == 0, process.stderr
        ran += 1
    assert ran >= 4


def test_the_commands_that_fine_tune(command, tmp_path):
    """With a file of the released shape in the place of the released one, and a tiny model."""
    root = tmp_path / "clips"
    clips.write_folder(root, {"train": 3, "val": 2})
    (body,) = [body for _, kind, body in BLOCKS if kind == "finetune"]
    download, train, evaluate = body.replace("DIR", str(root)).replace("\\\n", "").splitlines()
    assert download.startswith("curl -LO https://huggingface.co/Sense-X/uniformer_video/resolve/main/")
    released = tmp_path / download.rpartition("/")[2]
    arrays = weights.split(create_model("uniformer_tiny_video", num_classes=400))[1]
    state_dict = convert.to_torch(arrays.params | arrays.batch_stats)
    torch.save({key: torch.from_numpy(np.array(array)) for key, array in state_dict.items()}, released)
    assert f"--config.init_from={released.name}" in train
    train = train.replace(released.name, str(released)).replace(
        "structvit_s_4_1_video", "structvit_tiny_4_1_video"
    )
    tiny = [
        "--config.data.size=24",
        "--config.data.frames=4",
        "--config.eval.every=",
        "--config.train.grad_accum_steps=1",
    ]
    done = command(*shlex.split(train)[3:], *SHORT, *tiny, f"--workdir={tmp_path / 'runs' / 'folder'}")
    assert done.returncode == 0, done.stderr
    assert "as plain attention: 6 arrays" in done.stdout and "re-initialised, for " in done.stdout
    *python, module, run, root = shlex.split(evaluate)
    assert python == ["python", "-m"] and run == "runs/folder"
    done = command(run, root, module=module, first=functools.partial(os.chdir, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "result: top1" in done.stdout


def test_the_commands_for_own_videos(command, tmp_path, monkeypatch, capsys):
    root = tmp_path / "clips"
    clips.write_folder(root, {"train": 3, "val": 2})
    monkeypatch.chdir(tmp_path)
    (body,) = [body for _, kind, body in BLOCKS if kind == "clips"]
    ran = []
    for line in body.splitlines():
        module, *arguments = shlex.split(line.replace("DIR", str(root)))[2:]
        ran.append(module)
        if module == "structvit_jax.main":
            arguments += [*SHORT, *SMALL, "--config.eval.every=", f"--workdir={tmp_path / 'run'}"]
            process = command(*arguments)
            assert process.returncode == 0, process.stderr
        else:
            assert not importlib.import_module(module).main(arguments)
    assert ran == ["structvit_jax.data.prepare", *["structvit_jax.main"] * 2]
    assert (tmp_path / "run" / "batch.png").exists() and (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    "body", [body for language, kind, body in BLOCKS if (language, kind) == ("python", "run")]
)
def test_python_blocks(body):
    exec(compile(body, "README", "exec"), {})


@pytest.fixture(params=["docs", "."])
def clone(request, tmp_path, monkeypatch):
    """A clone in which a notebook is opened in docs/, as Jupyter does, or at the root."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path / request.param)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_the_notebook_finds_the_configurations(clone):
    exec(code_cells()[0], {})
    assert importlib.import_module("configs.moving_digits").__file__.startswith(str(clone))


def code_cells():
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("clone", ["docs"], indirect=True)
def test_the_notebook(clone, monkeypatch, caplog):
    """Its cells, one after the other, with a short training of a small model in the place of two minutes."""
    shown = []
    display = types.SimpleNamespace(Image=len, display=shown.append)
    shell = types.SimpleNamespace(display=display, version_info=(9, 0), get_ipython=lambda: None)
    monkeypatch.setitem(sys.modules, "IPython", shell)  # matplotlib asks it, too
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    small = "".join(map(_assignment, (*SHORT, *SMALL)))
    names = {}
    for code in code_cells():
        code = code.replace("digits(200)", "digits(8)")
        exec(code.replace('config.train.duration = "200 steps"\n', small), names)
    assert not [record for record in caplog.records if record.name == "absl"]
    assert (clone / "runs" / "notebook" / "result.json").exists()
    assert names["result"]["step"] == 2 and len(shown) == 2 and min(shown) > 10_000
    apart = np.abs(names["output"] - names["whole"][0][names["query"].position][0]).max()
    assert apart <= 1e-5 * np.abs(names["output"]).max()


def _assignment(word):
    """--config.key=value as a line of Python."""
    key, _, value = word.removeprefix("--").partition("=")
    is_text = key in ("config.train.duration", "config.optimizer.warmup")
    return f"{key} = {value!r}\n" if is_text else f"{key} = {value}\n"


def test_no_block_is_left_unchecked():
    assert {(language, kind) for language, kind, _ in BLOCKS} == {
        ("bash", "run"),
        ("bash", "clips"),
        ("bash", "finetune"),
        ("bash", "use"),
        ("python", "trained"),
        ("python", "run"),
        ("python", "config"),
    }


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory):
    """Lists of three classes, for configurations of data that are not here."""
    root = tmp_path_factory.mktemp("lists")
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("".join(f"{split}/{i}.mp4 {i % 3}\n" for i in range(9)))
    return str(root)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_build(name, own_clips):
    """Every configuration makes its data and its model, and the two fit."""
    namespace: dict = {}
    exec(compile(CONFIGS[name], name, "exec"), namespace)
    config = namespace["get_config"]()
    config.lock()
    if automatic.missing(config):
        config = config.copy_and_resolve_references()
        automatic.fill_model(config, lambda: True)
        automatic.fill(config, automatic.DataFacts(9, 9, 64, 64, 16))
    check_config(config)
    if config.data.name not in BUILT_IN:
        config.data.root = own_clips
    dataset = data.load(config.data, config.augment)
    assert "total" in show.describe(config, dataset)


def test_recipes_of_segment_sampled_sets():
    """Section 5 of the paper: MViT's augmentation without mirroring; for B random crops only."""
    small, base = (recipes.segment_video(f"structvit_{size}_4_1_video") for size in "sb")
    assert (small.data.frames, base.data.frames) == (16, 32)
    assert small.augment.flip == base.augment.flip == 0
    assert small.augment.randaugment and small.augment.mixup and small.augment.cutmix and small.augment.erase
    assert not (base.augment.randaugment or base.augment.mixup or base.augment.cutmix or base.augment.erase)
    assert base.augment.crop_area == (0.08, 1.0)


def test_fidelity_names_exist():
    text = (ROOT / "docs" / "FIDELITY.md").read_text()
    tests = re.findall(r"`tests/(test_\w+)\.py::(\w+)`", text)
    names = re.findall(r"`(structvit_jax[\w.]*)`", text)
    assert len(tests) > 30 and len(names) > 30
    for module, test in tests:
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text(), test
    for name in names:
        resolve(name)


def resolve(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


def test_links_point_to_files():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_placeholder_is_left():
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"`[^`]*`", "", document.read_text())
        assert not re.findall(r"(?:^|\s)[A-Z]+_[A-Z]+\b|^[A-Z]{4,}$|\bTODO\b", text, re.MULTILINE), document


def test_the_rooms_of_contributing_are_those_that_are_tested():
    from test_architecture import ROOMS

    listed = re.findall(r"^\| `structvit_jax/(\w+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(room for room in ROOMS if "__" not in room)
