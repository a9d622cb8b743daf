"""Process-wide settings of decoders: none at import, all of them in entry points and data workers."""

import contextlib
import subprocess
import sys

import cv2
from conftest import ROOT
from PIL import Image

from structvit_jax.data.media import configure_decoding
from structvit_jax.data.workers import in_processes

MODULES = sorted(
    f"structvit_jax.data.{path.stem}"
    for path in (ROOT / "structvit_jax" / "data").glob("*.py")
    if path.stem != "__init__"
)
IMPORT = """
import importlib, sys
import cv2
cv2.setNumThreads(3)
for name in sys.argv[1:]:
    importlib.import_module(name)
from PIL import Image
assert cv2.getNumThreads() == 3
assert Image.MAX_IMAGE_PIXELS
assert "jax" not in sys.modules
"""


def settings(number, note):
    return cv2.getNumThreads(), Image.MAX_IMAGE_PIXELS


def test_importing_the_data_package_changes_no_setting_and_imports_no_jax():
    process = subprocess.run(
        [sys.executable, "-c", IMPORT, *MODULES], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_types_need_no_decoder():
    code = "import sys, structvit_jax.data.types; assert not {'cv2', 'av', 'PIL'} & sys.modules.keys()"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_workers_apply_the_settings():
    results = in_processes(settings, [0], 1, ahead=1, on_death=None, setup=configure_decoding)
    with contextlib.closing(results):
        assert list(results) == [(1, None)]
