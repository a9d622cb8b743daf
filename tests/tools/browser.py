"""Test the pages of explain and report in headless Chromium: `make browser`, a minute; not part of the tests.

The pages are of models with random weights. The maps that the script computes must equal the model's; clicks,
keys and controls must change the maps. Pages with hostile names must be complete. A report must not break
words of class names, and bars must be beside their numbers. Without Chromium or Playwright, nothing is tested
and a line states so.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from structvit_jax import create_model
from structvit_jax.analysis.explain import layers, page, query_maps
from structvit_jax.analysis.explain.choice import Choice
from structvit_jax.analysis.explain.maps import position_of
from structvit_jax.analysis.explain.overlay import Scale
from structvit_jax.analysis.report import render as report
from structvit_jax.analysis.report.predictions import Predictions
from structvit_jax.analysis.report.record import Record
from structvit_jax.config import default_config
from structvit_jax.data.reader import Crop

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SMALL = {"widths": (8, 8, 16, 16), "head_width": 8, "depths": (1, 1, 2, 1)}
READ = """([number, head, query]) => {
    const layer = window.structvit.views()[number].layer;
    const maps = window.structvit.explain(layer, head, query);
    const kappa = window.structvit.kappa(layer, head, maps.attention, 0);
    const arrays = [maps.correlation, maps.attention, maps.final, kappa].map((a) => Array.from(a));
    return [layer.name, maps.rank, ...arrays];
}"""
SCALE = """(values) => {
    const scale = window.structvit.scaleOf(values);
    return [scale.low, scale.high, scale.signed];
}"""
HOSTILE = ["<!--<script>", "</script>", "<!-- a -->", "\"quoted' & \\\\", "line\u2028separator", "{{ data }}"]
UPDATE = """() => {
    const started = performance.now();
    window.structvit.update();
    return performance.now() - started;
}"""


BROKEN_WORDS = """() => {  // words of class names that are broken over lines
    const broken = [];
    for (const element of document.querySelectorAll(".cards dd, .classes th, table.matrix th")) {
        const text = element.firstChild, words = element.textContent.matchAll(/[^ -]+/g);
        for (const word of words) {
            const range = document.createRange();
            range.setStart(text, word.index);
            range.setEnd(text, word.index + word[0].length);
            if (range.getClientRects().length > 1) broken.push(word[0]);
        }
    }
    return broken;
}"""
BARS = """() => Array.from(document.querySelectorAll(".classes td .fraction"), (bar) => {
    const range = document.createRange();
    range.selectNodeContents(bar.previousSibling);
    const [text, box] = [range.getBoundingClientRect(), bar.getBoundingClientRect()];
    return [box.left - text.right, box.height / text.height, box.top - text.top, text.bottom - box.bottom];
})"""
CLASSES = (
    *("Ankle boot", "Bag", "Coat", "Dress", "Pullover"),
    *("Sandal", "Shirt", "Sneaker", "T-shirt", "Trouser"),
)


def build(names, shape, overrides, *, crop=(0, 0, 1, 1), title="noise"):
    """Return a page of models side by side on frames of noise, and their layers; `crop` is what they saw."""
    x = jax.random.normal(jax.random.key(0), (1, *shape, 3))
    *time, height, width = shape
    size = (time[0] if time else 1, round(height / crop[2]) * 3, round(width / crop[3]) * 3, 3)
    frames = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    found = {name: layers(create_model(name, num_classes=3, seed=1, **overrides[name]), x) for name in names}
    views = [
        page.ModelView(name, "a 0.9", "true class: a", number == 0, own, Crop(*crop))
        for number, (name, own) in enumerate(found.items())
    ]
    choice = Choice(next(iter(found[names[0]])), 0, (0.5,) * len(shape))
    return page.build(views, frames, choice, title=title), found


def open_page(browser, html, folder, size):
    path = Path(folder) / "page.html"
    path.write_text(html)
    tab = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    tab.complaints = []
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-ready]", timeout=60_000)
    return tab


def check_numbers(tab, found):
    """Compare the script's maps with the model's for all layers and heads, to half precision."""
    compared = 0
    for name in tab.locator("#layer option").all_inner_texts():
        tab.select_option("#layer", name)
        for number, own in enumerate(found.values()):
            layer = own.get(name)
            if layer is None:
                continue
            last = int(np.prod(layer.grid)) - 1
            for head, query in itertools.product(range(layer.attention.heads), (0, last // 2, last)):
                shown, rank, correlation, attention, final, kappa = tab.evaluate(READ, [number, head, query])
                position = np.unravel_index(query, layer.grid)
                maps = query_maps(layer, head, tuple(map(int, position)))
                assert shown == name
                near(correlation, maps.correlation)
                near(attention, maps.attention)
                near(final, maps.final.mean(axis=-1))
                for map_ in (maps.correlation, maps.final.mean(axis=-1), *maps.attention):
                    low, high, signed = tab.evaluate(SCALE, map_.ravel().tolist())
                    assert signed == Scale.of(map_).signed
                    near([low, high], np.array(Scale.of(map_)[:2]))
                near(kappa, maps.kappa.reshape(-1, *maps.kappa.shape[len(layer.grid) :])[0].mean(axis=-1))
                assert abs(rank - maps.rank) < 0.02, (rank, maps.rank)
                compared += 1
    return compared


def near(shown, own):
    np.testing.assert_allclose(np.ravel(shown), np.ravel(own), atol=4e-3 * np.abs(own).max())


def check_pointing(tab, found):
    """Check that a click, keys, and another layer and head each change the maps and the address."""
    frames, maps = tab.locator("#frames"), tab.locator("canvas.map")

    def picture():
        return [maps.nth(i).evaluate("canvas => canvas.toDataURL()") for i in range(maps.count())]

    def changes(act):
        before, address = picture(), tab.url
        act()
        assert picture() != before and tab.url != address
        layer = next(iter(found.values()))[tab.input_value("#layer")]
        point = tab.evaluate("window.structvit.state.query")[3 - len(layer.grid) :]
        assert (
            "row {}, column {}".format(*position_of(layer, point)[-2:]) in tab.locator("#where").inner_text()
        )

    tab.select_option("#layer", tab.locator("#layer option").all_inner_texts()[0])
    box = frames.bounding_box()
    changes(lambda: frames.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.2}))
    changes(lambda: frames.press("ArrowDown"))
    changes(lambda: frames.press("ArrowLeft"))
    if tab.evaluate("window.structvit.views()[0].layer.grid[0]") > 1:
        changes(lambda: frames.press("PageUp"))
    if tab.locator("#times").is_visible():
        check_time(tab, picture)
    for kind in ("#smooth", "#over"):
        before = picture()
        tab.click(kind)
        assert picture() != before
        tab.click(kind)
        assert picture() == before
    changes(lambda: tab.select_option("#head", "1"))
    changes(lambda: tab.select_option("#layer", tab.locator("#layer option").all_inner_texts()[-1]))
    caption = tab.locator(".at").first.inner_text()
    maps.nth(1).click(position={"x": 12, "y": 12})
    assert tab.locator(".at").first.inner_text() != caption
    address, query = tab.url, tab.evaluate("window.structvit.state.query")
    tab.goto("about:blank")
    tab.goto(address)  # restores the query
    tab.wait_for_selector("body[data-ready]")
    np.testing.assert_allclose(tab.evaluate("window.structvit.state.query"), query, atol=1e-3)


def check_time(tab, picture):
    """Check that the slider and the button change the large canvases."""
    before = picture()
    tab.locator("#time").fill("0" if tab.input_value("#time") != "0" else "1")
    assert picture() != before
    tab.click("#play")
    number = tab.input_value("#time")
    tab.wait_for_function("(number) => document.getElementById('time').value !== number", arg=number)
    tab.click("#play")


def check_hostile_names(browser, folder):
    """Check that names stay text and the page is complete."""
    for name in HOSTILE:
        html, _ = build(
            ["deit_tiny"], (24, 24), {"deit_tiny": {"widths": (16,), "head_width": 8}}, title=name
        )
        tab = open_page(browser, html, folder, WIDTHS["desktop"])
        shown = tab.locator("#title").evaluate("title => title.textContent")
        assert shown == name and tab.locator("canvas.map.large").count() == 3 and not tab.complaints, name
        tab.close()
    print(f"{len(HOSTILE)} pages with hostile names are complete")


def check_tiles(tab, crop):
    """Check that tiles are large enough to click on, and that a click selects the position under it."""
    frames = tab.locator("#frames")
    count, columns, rows = frames.evaluate("({ tiles }) => [tiles.count, tiles.columns, tiles.rows]")
    box = frames.bounding_box()
    assert columns * rows >= count > columns * (rows - 1) and box["width"] / columns >= 79
    for number, down, right in ((0, 0.25, 0.75), (count - 1, 0.75, 0.25)):
        row, column = divmod(number, columns)
        at = {"x": (column + right) / columns * box["width"], "y": (row + down) / rows * box["height"]}
        frames.click(position=at)
        query = tab.evaluate("window.structvit.state.query")
        clicked = (down - crop[0]) / crop[2], (right - crop[1]) / crop[3]
        np.testing.assert_allclose(query, ((number + 0.5) / count, *clicked), atol=0.04)


def check_width(tab):
    """Check that nothing is wider than the window, apart from elements that scroll."""
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def small_pages():
    video = ("structvit_tiny_4_2_video", "structvit_tiny_1_1_video", "uniformer_tiny_video")
    whole, part = (0, 0, 1, 1), (0, 0.15, 1, 0.7)
    yield "video", part, *build(video, (6, 48, 64), dict.fromkeys(video, SMALL), crop=part)
    shared = SMALL | {"key_kernels": "shared", "value_kernels": "shared", "key_window": 5}
    yield "image", whole, *build(["structvit_tiny_3_1"], (48, 48), {"structvit_tiny_3_1": shared})


def report_page():
    """Return a report on random predictions of digits, under the names of other classes."""
    config = default_config()
    config.data.name, config.data.frames, config.data.size = "digits", 0, 32
    rng = np.random.default_rng(0)
    ids = np.array([f"digits/test/{number}" for number in range(360)])
    scores = rng.normal(size=(len(ids), len(CLASSES)))
    predictions = Predictions(ids, rng.integers(len(CLASSES), size=len(ids)), scores, CLASSES)
    record = Record(epath.Path("run"), "run", config, (), {}, predictions, {})
    return report.render([record], hardest=12)


def check_report(browser, folder, screenshots):
    """Check that class names are in one piece, and bars beside their numbers and as high."""
    path = Path(folder) / "report.html"
    path.write_text(report_page())
    for device, (width, height) in WIDTHS.items():
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.goto(path.as_uri())
        check_width(tab)
        if screenshots:
            tab.screenshot(path=f"{screenshots}/report_{device}.png", full_page=True)
        assert not (broken := tab.evaluate(BROKEN_WORDS)), broken
        bars = np.array(tab.evaluate(BARS))
        assert len(bars) == len(CLASSES) and (bars[:, 0] > 0).all() and (bars[:, 1] > 0.6).all(), bars
        assert (bars[:, 2:] > -2).all(), bars
        print(f"report, {device}: class names in one piece, bars beside their numbers")


def check_large(browser, folder):
    """Check that the page of StructViT-S on 16 frames of 224 x 224 opens and updates within a second."""
    name = "structvit_s_4_1_video"
    html, _ = build([name], (16, 224, 224), {name: {"depths": (1, 1, 8, 3)}})
    started = time.monotonic()
    tab = open_page(browser, html, folder, WIDTHS["desktop"])
    opened = time.monotonic() - started
    update = tab.evaluate(UPDATE)
    memory = tab.evaluate("performance.memory ? performance.memory.usedJSHeapSize / 2**20 : 0")
    kept = tab.locator("#layer option").count()
    print(
        f"{name}, 16 x 224 x 224: {len(html) / 2**20:.1f} MB, {kept} of 11 layers, opens in {opened:.1f} s,"
        f" a query takes {update:.0f} ms, {memory:.0f} MB of JavaScript memory"
    )
    assert not tab.complaints and update < 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", help="Folder for screenshots of the pages at two widths.")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        print(f"skipped, nothing tested: it needs {' or '.join(BROWSERS)} and pip install playwright")
        return
    pages = list(small_pages())
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=path, args=OPTIONS)
        for kind, crop, html, found in pages:
            for device, size in WIDTHS.items():
                tab = open_page(browser, html, folder, size)
                check_width(tab)
                compared = check_numbers(tab, found)
                check_tiles(tab, crop)
                check_pointing(tab, found)
                if options.screenshots:
                    tab.screenshot(path=f"{options.screenshots}/{kind}_{device}.png", full_page=True)
                assert not tab.complaints, tab.complaints
                print(f"{kind}, {device}: {compared} queries agree with the model, mouse and keys work")
        check_report(browser, folder, options.screenshots)
        check_hostile_names(browser, folder)
        check_large(browser, folder)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
