"""A real browser and a real JupyterLab, for test_browser.py and benchmarks/explorer_clicks.py."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
READY = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  const until = async (ready) => { while (!ready()) await new Promise((done) => setTimeout(done, 100)); };
  await until(() => app.shell.currentWidget?.sessionContext);
  const context = app.shell.currentWidget.sessionContext;
  await context.ready;
  await until(() => context.session?.kernel?.status === 'idle');
}"""


def browser_path() -> str | None:
    """Chromium, or a browser made of it, where one is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator:
    """Playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def jupyter_lab(folder: Path, **environment: str) -> Iterator[tuple[str, str]]:
    """JupyterLab on a folder, with settings of its own.  ->  (address, token)"""
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
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT), **environment}
    with open(folder / "jupyter.log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={token}", process)
        yield address, token
    finally:
        process.terminate()
        try:
            process.wait(60)  # it ends its kernels first, and other tests may have the cores
        except subprocess.TimeoutExpired:  # its kernels end by themselves once it is gone
            process.kill()
            process.wait()


def _wait_for(address: str, process) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError("JupyterLab did not start")


def open_notebook(page, lab: tuple[str, str], path: Path, cells: list[str]) -> None:
    """Writes a notebook into JupyterLab's folder, opens it alone, and waits for its kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    page.goto(f"{lab[0]}/doc/tree/{path.name}?token={lab[1]}")
    page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
    page.evaluate(READY)


def run_all(page) -> None:
    """Runs the cells of the open notebook, and waits until they have run."""
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
