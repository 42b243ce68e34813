"""The explorer in a real browser: in JupyterLab and as an exported page. Collected only where a browser is installed.

Screenshots stay in build/screenshots. EXPLORER_CUT=1 cuts the click handler, to see that the tests then fail.
"""

import os
import re
import time

import pytest
from browser import ROOT, chromium, jupyter_lab, open_notebook, run_all
from conftest import micro_model

from entroformer_lib.datasets import sample_picture
from entroformer_lib.explorer.page import explorer_page
from entroformer_lib.explorer.widget import SCRIPT
from entroformer_lib.inspection.exploration import Exploration
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.weights.zoo import load_model, save_weights

SCREENSHOTS = ROOT / "build" / "screenshots"
KINDS = ("parallel", "serial", "groupedmixer")
CLICK = 'canvas.addEventListener("click"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights and a picture with a grid of 8 x 12 latents."""
    folder = tmp_path_factory.mktemp("browser")
    for kind in KINDS:
        save_weights(micro_model(kind, window=4), folder / f"{kind}.safetensors", {})
    sample_picture("astronaut").crop((100, 0, 292, 128)).save(folder / "photo.png")
    return folder


def exploration(folder, kind) -> Exploration:
    return Exploration(server_of(load_model(folder / f"{kind}.safetensors", "cpu"), folder / "photo.png"))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def watched(browser):
    """A browser page that notes errors and requests to other hosts; there must be none."""
    page = browser.new_page(viewport={"width": 1400, "height": 1050})
    errors, foreign = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def note(request):
        if not re.match(r"(file|data|blob):|(http|ws)://127\.0\.0\.1[:/]", request.url):
            foreign.append(request.url)

    page.on("request", note)
    yield page
    page.close()
    assert errors == [] and foreign == []


def as_the_user_does(page, view: Exploration, name: str) -> list[float]:
    """Clicks, keys and sliders; after each the caption is a fresh view model's and the pixels are others.

    Returns:
        Seconds from each action to changed pixels.
    """
    page.wait_for_selector(".ef-panel canvas", timeout=60_000)
    page.wait_for_function("document.querySelector('.ef-caption').textContent.startsWith('Latent')")
    assert page.inner_text(".ef-caption") == view.caption()
    page.evaluate("document.querySelector('.ef-about').open = false")
    server, seconds = view.servers[0], []

    def after(action, **expected):
        pixels = "document.querySelector('.ef-panel canvas').toDataURL()"
        before = page.evaluate(pixels)
        start = time.perf_counter()
        action()
        page.wait_for_function(f"before => {pixels} !== before", arg=before, timeout=2000)
        seconds.append(time.perf_counter() - start)
        view.update(**expected)
        page.wait_for_function(
            "words => document.querySelector('.ef-caption').textContent === words", arg=view.caption()
        )

    def click(row, column):
        box = page.locator(".ef-panel canvas").first.bounding_box()
        cell = box["width"] / server.width, box["height"] / server.height
        page.mouse.click(box["x"] + (column + 0.5) * cell[0], box["y"] + (row + 0.5) * cell[1])

    inner = server.height // 2 + 1, server.width // 2 - 2
    for row, column in (inner, (inner[0], inner[1] + 1), (0, server.width - 1)):
        after(lambda row=row, column=column: click(row, column), row=row, column=column)
    after(lambda: click(*inner), row=inner[0], column=inner[1])
    page.locator(".ef-panel canvas").first.focus()
    after(lambda: page.keyboard.press("ArrowDown"), row=inner[0] + 1)
    after(lambda: page.keyboard.press("ArrowLeft"), column=inner[1] - 1)
    page.locator(".ef-layer").focus()
    after(lambda: page.keyboard.press("ArrowLeft"), layer=view.layer - 1)
    page.locator(".ef-head").focus()
    after(lambda: page.keyboard.press("ArrowRight"), head=0)
    grouped = server.kind == "grouped"
    assert page.locator(".ef-k").is_visible() != grouped and page.locator(".ef-slice").is_visible() == grouped
    if grouped:
        page.locator(".ef-slice").focus()
        after(lambda: page.keyboard.press("ArrowRight"), slice=2)
        after(lambda: choose_group(page, 5, len(server.order)), **at_group(view, 5))
    else:
        page.locator(".ef-k").focus()
        after(lambda: page.keyboard.press("ArrowRight"), k=view.ks[view.ks.index(view.k) + 1])
        after(lambda: page.keyboard.press("Home"), k=view.ks[0])  # the model's own: the page holds costs for that
    assert page.locator(".ef-modes button").count() == len(view.modes)
    for mode in (*list(view.modes)[1:], "head"):
        page.click(f"button[data-mode={mode}]")
        view.update(mode=mode)
        page.wait_for_function(
            "words => document.querySelector('.ef-caption').textContent === words", arg=view.caption()
        )
        count = len(view.panels())
        page.wait_for_function("count => document.querySelectorAll('.ef-panel canvas').length === count", arg=count)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}-{mode}.png")
    return seconds


def choose_group(page, group: int, groups: int) -> None:
    """Clicks a row of the table of groups, whose left margin is as wide as the one above."""
    table = page.locator("canvas.ef-groups").first
    box, (margin, cell) = table.bounding_box(), table.evaluate("c => [c.table.pad, c.table.cell]")
    assert margin + groups * cell == pytest.approx(1, abs=0.02)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * (margin + (group + 0.5) * cell))


def at_group(view: Exploration, group: int) -> dict:
    """The selection of a group at the present place."""
    channel_slice, row, column = view.servers[0].order[group]
    return {"row": view.row // 2 * 2 + row, "column": view.column // 2 * 2 + column, "slice": channel_slice}


@pytest.mark.parametrize("kind", KINDS)
def test_exported_page(watched, folder, kind):
    view = exploration(folder, kind)
    text = explorer_page(view.servers[0], "astronaut").text
    if os.environ.get("EXPLORER_CUT"):
        assert CLICK in text
        text = text.replace(CLICK, "((name, handler) => name)('click'")
    (folder / f"{kind}.html").write_text(text)
    watched.goto((folder / f"{kind}.html").as_uri())
    as_the_user_does(watched, view, f"page-{kind}")


# ---- JupyterLab ----

NOTEBOOK = """\
from entroformer_lib import load_model
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.explorer.widget import Explorer
from entroformer_lib.inspection.exploration import Exploration
Explorer(Exploration(server_of(load_model("{kind}.safetensors", "cpu"), "photo.png")))"""
TWO = """
one, other = (server_of(load_model(kind + ".safetensors", "cpu"), "photo.png") for kind in ("parallel", "serial"))
Explorer(Exploration(one, other))"""
CUT = """
from entroformer_lib.explorer import widget as explorer
explorer.Explorer._esm = explorer.SCRIPT.read_text().replace({click!r}, "((name, handler) => name)('click'")
"""


@pytest.fixture(scope="module")
def jupyter(folder):
    """JupyterLab.  ->  (address, token)"""
    with jupyter_lab(folder) as lab:
        yield lab


def perhaps_cut(source: str) -> str:
    """The cell with the click handler cut, where EXPLORER_CUT asks for it."""
    if not os.environ.get("EXPLORER_CUT"):
        return source
    assert CLICK in SCRIPT.read_text()
    return CUT.format(click=CLICK) + source


@pytest.mark.parametrize("kind", KINDS)
def test_widget_in_jupyterlab(watched, folder, kind, jupyter):
    open_notebook(watched, jupyter, folder / f"{kind}.ipynb", [perhaps_cut(NOTEBOOK.format(kind=kind))])
    run_all(watched)
    as_the_user_does(watched, exploration(folder, kind), f"jupyterlab-{kind}")


def test_two_models_in_jupyterlab(watched, folder, jupyter):
    source = NOTEBOOK.format(kind="parallel").rsplit("\n", 1)[0] + TWO
    open_notebook(watched, jupyter, folder / "two.ipynb", [perhaps_cut(source)])
    run_all(watched)
    view = Exploration(*(exploration(folder, kind).servers[0] for kind in KINDS[:2]))
    as_the_user_does(watched, view, "jupyterlab-two")
    assert watched.locator(".ef-side h3").all_inner_texts()[:2] == ["parallel", "serial"]
