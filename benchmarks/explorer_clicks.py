"""How long the attention explorer takes in a real browser on a real JupyterLab, from a click to the changed picture.

python benchmarks/explorer_clicks.py blocks-parallel --pictures kodak/ --out data/results/explorer_latency.json

The clock runs in the browser: from the event (click or slider) to the first frame on the screen that shows the new
picture. Python's share, the way through the kernel and the drawing are all in it. It needs Chromium.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import tyro
from tyro.conf import Positional

from entroformer_lib import load_model
from entroformer_lib.files import write_bytes
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import provenance
from entroformer_lib.weights.zoo import save_weights

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import chromium, jupyter_lab, open_notebook  # noqa: E402

# Milliseconds that are wanted at most, for each kind of action.
CLICK_MS, K_MS, FIRST_MS = 100, 1000, 3000
LOAD = """\
from entroformer_lib import load_model
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.explorer.widget import Explorer
model = load_model("{model}.safetensors", "cpu")"""
SHOW = 'Explorer(RowServer(model, "{picture}"))'
# Notes the time of the next event, and resolves once the caption (written after the drawing) has changed and the
# browser has painted; of a first view, once there is a caption.
CLOCK = """
window.clock = (event) => {
  const words = () => document.querySelector(".ef-caption")?.textContent || "";
  const before = words();
  let start = event ? null : performance.now();
  if (event) document.addEventListener(event, () => { start ??= performance.now(); }, { capture: true, once: true });
  window.measured = new Promise((done) => {
    const look = () => {
      if (start === null || words() === before) return;
      watcher.disconnect();
      requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0)); // after the paint
    };
    const watcher = new MutationObserver(look);
    watcher.observe(document.body, { childList: true, subtree: true, characterData: true });
  });
};
"""
RUN = "(cell) => { %s; window.jupyterapp.shell.currentWidget.content.activeCellIndex = cell; %s }"
RUN_CELL = "return window.jupyterapp.commands.execute('notebook:run-cell')"
MODES = {
    "heads": "all heads of the layer (figure 9)",
    "ks": "one head, several k (figure 10)",
    "pair": "one head, two k side by side",
    "cost": "attention against measured cost",
}


class Session:
    """A notebook with one explorer; every action is timed and must change the picture."""

    def __init__(self, page, lab, folder: Path, model: str, picture: str):
        self.page = page
        cells = [LOAD.format(model=model), SHOW.format(picture=picture)]
        open_notebook(page, lab, folder / f"{model}-{Path(picture).stem}.ipynb", cells)
        page.evaluate(RUN % ("", RUN_CELL), 0)
        page.evaluate(CLOCK)
        page.evaluate(RUN % ("window.clock(null)", RUN_CELL), 1)
        self.first_ms = page.evaluate("window.measured")
        page.evaluate("document.querySelector('.ef-about').open = false")
        self.canvas = page.locator(".ef-panel canvas").first

    def time(self, event: str, action) -> float:
        """Milliseconds from the event to the painted picture."""
        pixels = "document.querySelector('.ef-panel canvas').toDataURL()"
        before = self.page.evaluate(pixels)
        self.page.evaluate("event => window.clock(event)", event)
        action()
        passed = self.page.evaluate("window.measured")
        assert self.page.evaluate(pixels) != before, "the picture has not changed"
        return passed

    def click(self, row: int, column: int, height: int = 32, width: int = 48) -> float:
        """Clicks a latent of the first map."""
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        x, y = (column + 0.5) * box["width"] / width, (row + 0.5) * box["height"] / height
        return self.time("click", lambda: self.canvas.click(position={"x": x, "y": y}))

    def slide(self, name: str, key: str) -> float:
        """Moves a slider by a key."""
        self.page.locator(f".ef-{name}").focus()
        return self.time("input", lambda: self.page.keyboard.press(key))

    def mode(self, name: str) -> None:
        """Changes what is shown, untimed."""
        words = self.page.inner_text(".ef-caption")
        self.page.click(f"button[data-mode={name}]")
        self.page.wait_for_function("w => document.querySelector('.ef-caption').textContent !== w", arg=words)


# Latents that depend on context in either model.
PLACES = [(10, 14), (10, 16), (21, 31), (5, 43), (28, 6), (16, 24), (0, 46), (30, 40), (13, 3), (24, 18)]


def measure(session: Session) -> dict[str, tuple[list[float], float | None]]:
    """Times of all actions in milliseconds, each with its target or None."""
    click, slide = session.click, session.slide
    layers = [slide("layer", "ArrowLeft") for _ in range(5)]
    times = {
        "click on a latent": ([click(*place) for place in PLACES], CLICK_MS),
        "another layer": (layers, CLICK_MS),
        "another head": ([slide("head", key) for key in ("ArrowRight", "ArrowRight", "ArrowLeft")], CLICK_MS),
        "another k": ([slide("k", "Home"), *(slide("k", "ArrowRight") for _ in range(4))], K_MS),
        "another k, seen before": ([slide("k", "ArrowLeft") for _ in range(4)], CLICK_MS),
    }
    for number, (mode, words) in enumerate(MODES.items()):
        session.mode(mode)
        target = None if mode == "cost" else CLICK_MS  # the cost of a latent is a study of its own: 100 to 400 passes
        places = [((row + 2 * number + 2) % 32, column) for row, column in PLACES[::2]]  # not seen before
        times[f"click on a latent, {words}"] = [click(*place) for place in places], target
    return times


def main(
    model: Positional[str],
    pictures: Path,
    out: Path | None = None,
    limit: int = 3,
    threads: int = 1,
    note: str = "",
    screenshots: Path | None = None,
) -> None:
    """Writes {"models": {NAME: {"rows": [{action, count, median_ms, max_ms, target_ms}], "provenance", …}}}.

    A file that is there keeps what it holds of other models.

    Args:
        model: A name of shipped weights.
        pictures: Folder of pictures of 768 x 512 pixels.
        out: The result.
        limit: First views are timed on so many pictures, each in a kernel of its own; the clicks on the first.
        threads: Of the kernel.
        note: What else the machine was doing.
        screenshots: Folder for pictures of the last state.
    """
    first, times = [], {}
    paths = pictures_to_test(pictures, limit)
    loaded = load_model(model, "cpu")
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        save_weights(loaded, folder / f"{model}.safetensors", {})
        for path in paths:
            shutil.copy(path, folder / path.name)
        with jupyter_lab(folder, OMP_NUM_THREADS=str(threads)) as lab:
            for path in paths:
                page = browser.new_page(viewport={"width": 1400, "height": 1050})
                session = Session(page, lab, folder, model, path.name)
                first.append(session.first_ms)
                times = times or measure(session)
                if screenshots:
                    page.screenshot(path=screenshots / f"{model}-{path.stem}.png")
                page.close()
        version = browser.version
    times = {"first view of a picture": (first, FIRST_MS), **times}
    result = json.loads(out.read_text()) if out and out.exists() else {"models": {}}
    result["models"][model] = {
        "rows": [_row(action, *measured) for action, measured in times.items()],
        "threads": threads,
        "note": note,
        "load_before": round(before, 2),
        "browser": f"Chromium {version}",
        "pictures": [path.stem for path in paths],
        "provenance": provenance(loaded),
    }
    if out:
        write_bytes(out, (json.dumps(result, indent=1) + "\n").encode())


def _row(action: str, times: list[float], target: float | None) -> dict:
    median, most = round(statistics.median(times)), round(max(times))
    print(f"{action:45} median {median:5} ms, at most {most:5} ms", flush=True)
    return {"action": action, "count": len(times), "median_ms": median, "max_ms": most, "target_ms": target}


if __name__ == "__main__":
    tyro.cli(main)
