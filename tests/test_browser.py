"""The explorer in a real browser: in JupyterLab and as an exported page. Collected only where a browser is installed.

Screenshots stay in build/screenshots. EXPLORER_CUT=1 cuts the click handler, to see that the tests then fail.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import browser_path, micro_model

from entroformer_lib.datasets import sample_picture
from entroformer_lib.models.zoo import load_model, save_weights
from entroformer_lib.studies.row_server import RowServer
from entroformer_lib.views.explorer import SCRIPT
from entroformer_lib.views.explorer_model import Exploration
from entroformer_lib.views.explorer_page import explorer_page

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
KINDS = ("parallel", "serial")
CLICK = 'canvas.addEventListener("click"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights and a picture with a grid of 8 x 12 latents."""
    folder = tmp_path_factory.mktemp("browser")
    for kind in KINDS:
        save_weights(micro_model(kind), folder / f"{kind}.safetensors", {})
    sample_picture("astronaut").crop((100, 0, 292, 128)).save(folder / "photo.png")
    return folder


def exploration(folder, kind) -> Exploration:
    return Exploration(RowServer(load_model(folder / f"{kind}.safetensors", "cpu"), folder / "photo.png"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield browser
        browser.close()


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
    page.locator(".ef-k").focus()
    after(lambda: page.keyboard.press("ArrowRight"), k=view.ks[view.ks.index(view.k) + 1])
    after(lambda: page.keyboard.press("Home"), k=view.ks[0])  # the model's own: the page holds costs for that
    for mode in ("heads", "ks", "cost", "head"):
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
from entroformer_lib.studies.row_server import RowServer
from entroformer_lib.views.explorer import Explorer
from entroformer_lib.views.explorer_model import Exploration
Explorer(Exploration(RowServer(load_model("{kind}.safetensors", "cpu"), "photo.png")))"""
CUT = """
from entroformer_lib.views import explorer
explorer.Explorer._esm = explorer.SCRIPT.read_text().replace({click!r}, "((name, handler) => name)('click'")
"""
RUN_ALL = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  const until = async (ready) => { while (!ready()) await new Promise((done) => setTimeout(done, 100)); };
  await until(() => app.shell.currentWidget?.sessionContext);
  const context = app.shell.currentWidget.sessionContext;
  await context.ready;
  await until(() => context.session?.kernel?.status === 'idle');
  await app.commands.execute('notebook:run-all-cells');
}"""


@pytest.fixture(scope="module")
def jupyter(folder):
    """JupyterLab with settings of its own.  ->  (address, token)"""
    home = folder / "jupyter"
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
    places = {name: str(home / name) for name in (*names, "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    settings = Path(places["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    news = {"fetchNews": "false", "checkForUpdates": False}  # the pop-up would cover the widget
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(news))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(8)
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--allow-root", "--no-browser", "--ServerApp.ip=127.0.0.1"),
        *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"),
        *(f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"),
        "--LabApp.extension_manager=readonly",
    ]
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
    with open(folder / "jupyter.log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={token}", process)
        yield address, token
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(address: str, process) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError("JupyterLab did not start")


@pytest.mark.parametrize("kind", KINDS)
def test_widget_in_jupyterlab(watched, folder, kind, jupyter):
    address, token = jupyter
    source = NOTEBOOK.format(kind=kind)
    if os.environ.get("EXPLORER_CUT"):
        assert CLICK in SCRIPT.read_text()
        source = CUT.format(click=CLICK) + source
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{kind}.ipynb")
    watched.goto(f"{address}/doc/tree/{kind}.ipynb?token={token}")
    watched.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
    watched.evaluate(RUN_ALL)
    as_the_user_does(watched, exploration(folder, kind), f"jupyterlab-{kind}")
