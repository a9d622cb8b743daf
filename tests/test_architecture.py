"""The structure of the package: imports between packages, and the sizes and names of files."""

from __future__ import annotations

import ast
import collections
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "structvit_jax"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "configs" not in path.parts)  # configs is a link
# Package, or single file -> packages of the project and third-party modules that it may import.
# "__init__" is `import structvit_jax` itself, for its version.
IMPORTS = {
    "utils": ("", "etils"),
    "runtime": ("utils", "etils jax numpy"),
    "ops": ("utils runtime", "jax jaxlib jaxtyping numpy"),
    "models": ("utils ops", "flax jax jaxtyping numpy"),
    "config": ("utils models", "ml_collections"),
    "convert": ("utils models", "jax numpy safetensors torch"),
    "data": (
        "utils",
        "PIL apache_beam av cloudpickle cv2 etils numpy pillow_heif sklearn tensorflow_datasets tqdm",
    ),
    "training": (
        "__init__ utils runtime ops models config convert data",
        "etils jax jaxtyping ml_collections numpy optax orbax tensorboardX",
    ),
    "convert/conversion": (  # builds on checkpoints; `structvit_jax.convert` does not import it
        "__init__ utils runtime models config convert training",
        "etils jax ml_collections numpy",
    ),
    "inference": (
        "__init__ utils runtime ops models config convert data training",
        "etils jax ml_collections numpy tqdm",
    ),
    "performance": (
        "utils runtime ops models config convert data training inference",
        "PIL av decord etils flax jax jaxlib matplotlib ml_collections numpy"
        " timm torch torchcodec torchvision",
    ),
    "analysis": (
        "__init__ utils runtime ops models config data training inference performance",
        "PIL av etils flax jax jinja2 matplotlib ml_collections numpy scipy",
    ),
    "cli": (
        "__version__ utils runtime ops models config convert data training inference performance analysis",
        "click etils ml_collections numpy",
    ),
    "main": ("cli", "click"),
    "__main__": ("cli", ""),
    "__init__": ("convert inference models ops performance", ""),  # on first use
}


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "imports are absolute"
            if node.module == "structvit_jax":
                yield from ((node.lineno, f"structvit_jax.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def _loaded(statement: str) -> set[str]:
    """Return the modules that a statement loads in a new interpreter."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.returncode == 0
    return set(process.stdout.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_package_may(path: Path):
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    package = name.partition("/")[0]
    packages, libraries = map(str.split, IMPORTS.get(name) or IMPORTS[package])
    for line, module in _imports(path):
        top, _, rest = module.partition(".")
        if top == "structvit_jax":
            imported, allowed = rest.partition(".")[0] or "__init__", [package, *packages]
        elif top in sys.stdlib_module_names:
            continue
        else:
            imported, allowed = top, libraries
        assert imported in allowed, f"{path.relative_to(ROOT)}:{line}: {package} may not import {module}"


def test_packages_import_in_one_direction():
    order = list(IMPORTS)
    for package, (packages, _) in IMPORTS.items():
        later = set(order[order.index(package) :]) - {"__init__"}
        assert not later & set(packages.split()), package


def test_files_are_short():
    long = {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_the_package_has_few_entries():
    others = {"__init__.py", "__main__.py", "__pycache__", "configs", "py.typed"}
    entries = {path.name for path in PACKAGE.iterdir()} - others
    assert len(entries) <= 13, sorted(entries)


def test_module_names_are_unique():
    paths = collections.defaultdict(list)
    for path in FILES:
        if path.stem not in ("__init__", "__main__"):
            paths[path.stem].append(str(path.relative_to(PACKAGE)))
    assert not [same for same in paths.values() if len(same) > 1]


def test_models_load_definitions_without_kernels():
    loaded = {name for name in _loaded("import structvit_jax.models") if name.startswith("structvit_jax")}
    assert not [name for name in loaded if name.startswith("structvit_jax.ops.kernels")]
    files = [PACKAGE.joinpath(*name.split(".")[1:]) for name in loaded]
    files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1750


def test_reading_data_loads_neither_jax_nor_models():
    loaded = _loaded("import structvit_jax.data, structvit_jax.data.workers")
    assert not [name for name in loaded if name.split(".")[0] in ("jax", "flax", "tensorflow", "torch")]
    assert not [name for name in loaded if name.startswith("structvit_jax.models")]
