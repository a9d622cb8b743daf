"""Each room imports only what it may: the structure of the house, held by a test."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "structvit_jax"
# Folder or file -> third-party modules that may be imported, and rooms of ours.
ROOMS = {
    "cache": (set(), set()),
    "ops": ({"jax", "numpy"}, {"ops", "cache"}),
    "models": ({"jax", "numpy", "flax"}, {"ops", "models", "errors"}),
    "convert": (
        {"jax", "numpy", "safetensors", "torch"},
        {"convert", "models", "class_names", "errors", "paths"},
    ),
    "convert/__main__": (
        {"absl", "jax", "numpy", "etils", "ml_collections"},
        {"convert", "models", "training", "recipes", "errors", "paths", ""},
    ),
    "data": (
        {
            "numpy",
            "absl",
            "cloudpickle",
            "sklearn",
            "av",
            "cv2",
            "PIL",
            "tensorflow_datasets",
            "apache_beam",
            "pillow_heif",
            "etils",
            "tqdm",
        },
        {"data", "class_names", "errors", "paths"},
    ),
    "config": ({"ml_collections"}, {"models", "errors"}),
    "card": ({"ml_collections"}, {"config", "models", "errors"}),
    "recipes": ({"ml_collections"}, {"config", "errors"}),
    "command": ({"absl", "etils", "ml_collections"}, {"card", "config", "training", "errors"}),
    "open_keys": ({"ml_collections"}, {"config", "models"}),
    "evaluate": ({"absl", "etils"}, {"command", "data", "training", "errors", "paths"}),
    "report": (
        {"absl", "numpy", "etils", "ml_collections", "matplotlib", "PIL"},
        {"report", "command", "data", "sheet", "training", "models", "card", "config", "errors", "paths"},
    ),
    "label_maps": (
        {"absl", "jax", "numpy", "ml_collections", "tqdm"},
        {"command", "data", "models", "ops", "training", "errors"},
    ),
    "trained": (
        {"jax", "numpy", "ml_collections"},
        {"card", "config", "data", "models", "training", "errors"},
    ),
    "predict": ({"absl", "numpy"}, {"command", "trained", "training", "errors", "paths"}),
    "export": (
        {"absl", "jax", "etils"},
        {"command", "config", "ops", "trained", "training", "errors", "paths", ""},
    ),
    "explain": (
        {"absl", "jax", "numpy", "flax", "matplotlib", "PIL", "av", "etils"},
        {"explain", "command", "data", "models", "ops", "trained", "training", "errors", "paths"},
    ),
    "ablate": (
        {"absl", "jax", "numpy", "scipy", "matplotlib", "etils", "ml_collections"},
        {"ablate", "bench", "command", "config", "data", "models", "training", "errors", "paths", ""},
    ),
    "sheet": ({"jax", "numpy", "PIL", "etils", "ml_collections"}, {"training"}),
    "training": (
        {"jax", "numpy", "optax", "orbax", "etils", "ml_collections", "tensorboardX"},
        {
            "training",
            "convert",
            "models",
            "ops",
            "cache",
            "card",
            "config",
            "open_keys",
            "signals",
            "errors",
            "paths",
            "",
        },
    ),
    "bench": (
        {"jax", "numpy", "flax", "etils", "ml_collections", "matplotlib", "torch"},
        {"bench", "training", "convert", "models", "ops", "config", "traffic", "errors"},
    ),
    "motion": (
        {"absl", "jax", "numpy", "etils", "matplotlib"},
        {"command", "data", "ops", "training", "errors", "paths"},
    ),
    "show": ({"ml_collections"}, {"models", "config"}),
    "chips": ({"jax"}, {"errors"}),
    "plan": (
        {"jax", "etils", "ml_collections"},
        {"chips", "training", "models", "config", "traffic", "errors"},
    ),
    "main": (
        {"absl", "etils", "ml_collections"},
        {
            *("command", "data", "config", "open_keys", "errors", "paths", "training"),
            *("chips", "show", "plan", "sheet", "bench", "signals"),
        },
    ),
    "traffic": ({"jaxlib"}, {"traffic", "errors"}),
    "class_names": (set(), set()),
    "errors": (set(), set()),
    "paths": ({"etils"}, {"errors"}),
    "signals": (set(), {"errors"}),
    "__init__": (set(), {"signals"}),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """(line, module) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            deeper = node.module == "structvit_jax"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if deeper else [node.module]
            yield from ((node.lineno, name) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_within_the_room(path: Path):
    import sys

    room = str(path.relative_to(PACKAGE).with_suffix(""))
    room = room if room in ROOMS else room.split("/")[0]
    libraries, rooms = ROOMS[room]
    for line, module in imports(path):
        top, _, rest = module.partition(".")
        if top == "structvit_jax":
            allowed, guest = rooms, rest.split(".")[0]
        elif top in sys.stdlib_module_names:
            continue
        else:
            allowed, guest = libraries, top
        assert guest in allowed, f"{path.relative_to(ROOT)}:{line} {module} does not live in {room}"


def test_the_house_stays_small():
    """Places to look at when this fails, not a score: split by subject, not by size."""
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert len(lengths) <= 142
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.__getitem__)
