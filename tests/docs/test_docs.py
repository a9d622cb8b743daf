"""Names, links, tables and figures of the documentation exist, and its configurations and site build."""

import importlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from blocks import PAGES, blocks
from conftest import ROOT
from idx_writer import write_split

from structvit_jax import data
from structvit_jax.cli import COMMANDS, show
from structvit_jax.config import automatic, check_config, default_config, keys_of, recipes
from structvit_jax.data.dataset import BUILT_IN

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in [*PAGES, ROOT / "CHANGELOG.md"]}
CONFIGS = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.py"))}
CONFIGS |= {block.page: block.body for block in blocks() if block.marker == "run: config"}


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory):
    """Lists of three classes, for configurations of data that are not here."""
    root = tmp_path_factory.mktemp("lists")
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("".join(f"{split}/{i}.mp4 {i % 3}\n" for i in range(9)))
    return str(root)


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """IDX files of ten classes, for configurations of Fashion-MNIST."""
    root = tmp_path_factory.mktemp("images")
    images, labels = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
    for split in ("train", "t10k"):
        write_split(root, split, images, labels)
    return str(root)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_build(name, own_clips, own_images):
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
        config.data.root = own_images if config.data.root else own_clips
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
    text = TEXTS["docs/fidelity.md"]
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    names = re.findall(r"`(structvit_jax[\w.]*)`", text)
    assert len(tests) > 30 and len(names) > 30
    missing = [name for name in names if not exists(name)]
    missing += [
        f"{file}::{test}"
        for file, test in tests
        if not (ROOT / file).exists() or f"def {test}(" not in (ROOT / file).read_text()
    ]
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_configuration_keys_exist():
    """Those in the text, as `train.duration` or `config.train.duration`."""
    keys = dict(keys_of(default_config()))
    sections = {key.partition(".")[0] for key in keys}
    found = {
        match[1]
        for text in TEXTS.values()
        for match in re.finditer(r"`(?:--)?(?:config\.)?(\w+\.\w+)(?:=[^`]*)?`", text)
        if match[1].partition(".")[0] in sections
    }
    assert len(found) > 30
    others = {"model.scan_blocks", "train.csv", "train.jsonl"}  # a removed key, and files
    assert found - set(keys) <= others


def test_the_readme_lists_all_commands():
    listed = set(re.findall(r"^\| `structvit (\w+)` \|", TEXTS["README.md"], re.MULTILINE))
    assert listed == set(COMMANDS)


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 180


def test_models_of_the_readme_are_rows_of_the_table_of_all():
    rows = re.findall(r"^\| (?:structvit|uniformer)_.*\|$", TEXTS["README.md"], re.MULTILINE)
    assert len(rows) == 5 and set(rows) <= set(TEXTS["docs/models.md"].splitlines())


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_paths_exist(page):
    text = TEXTS[page]
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    if page != "docs/speed-history.md":
        for path in re.findall(
            r"`((?:structvit_jax|configs|examples|extras|launch|tests|docs)/[\w./]+)`", text
        ):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS)
def test_no_placeholder_is_left(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", TEXTS[page], flags=re.DOTALL)
    assert not re.findall(r"(?:^|\s)[A-Z]+_[A-Z]+\b|^[A-Z]{4,}$|\bTODO\b|@@", text, re.MULTILINE)


def test_the_site_builds(tmp_path):
    """In strict mode: no broken link, no page without navigation, no unknown name in the API reference."""
    if not shutil.which("mkdocs", path=f"{sys.prefix}/bin"):
        pytest.skip("mkdocs is not installed")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "api" / "index.html").exists()
