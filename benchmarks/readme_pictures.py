"""The pictures of README.md: the explorer in motion, and a drawing of what an Entroformer does.

    python benchmarks/readme_pictures.py

A page of the explorer is used in a real browser and photographed, so Chromium and playwright are needed, as for the
tests of the browser.
"""

import io
import sys
from pathlib import Path

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the browser of the tests
from browser import chromium

from benchmarks.overview import overview
from entroformer_lib.datasets import sample_picture
from entroformer_lib.explorer.page import explorer_page
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.views import style
from entroformer_lib.weights.zoo import load_model, reference_of

SIZE, SCALE = (1280, 780), 0.75  # pixels of the window; of the photographs for each of the window's
PART = (44, 40, 44 + 512, 40 + 320)  # of the coffee: what needs no padding
DRAWN = (9, 13)  # row and column of the latent whose attention is drawn
LONG, SHORT = 1500, 450  # milliseconds
PLACES = ((12, 20), (7, 21), (16, 12), (14, 26))  # rim of the cup, inside of it, saucer, spoon: row, column
CHOOSE = "([parts]) => document.querySelector('.ef-explorer').explorer.choose(parts)"


def scenes():
    """What is chosen, and how long it is shown."""
    for row, column in PLACES:
        yield {"mode": "head", "row": row, "column": column, "head": 0}, LONG
    for head in (1, 2):
        yield {"head": head}, LONG
    row, column = PLACES[0]
    yield {"row": row, "column": column, "mode": "cost", "head": 0}, LONG
    yield {"mode": "head", "backdrop": 2}, LONG
    yield {"backdrop": 3}, LONG
    for part in range(0, 11):
        yield {"backdrop": 0, "mode": "decoding", "part": part / 10}, SHORT


def in_motion(text: str, quality: int) -> bytes:
    """A page of the explorer, scene by scene, as an animated WebP."""
    frames, times = [], []
    with chromium() as browser:
        window = dict(zip(("width", "height"), SIZE, strict=True))
        page = browser.new_page(viewport=window, device_scale_factor=SCALE)
        page.set_content(text)
        page.wait_for_selector(".ef-explorer canvas")
        for parts, milliseconds in scenes():
            page.evaluate(CHOOSE, [parts])
            page.wait_for_timeout(800)  # the overview and pictures come a moment later
            frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
            times.append(milliseconds)
    times[-1] = LONG
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=times, loop=0, quality=quality, method=6)
    return buffer.getvalue()


def main(model: str = "blocks-parallel", out: Path | None = None, quality: int = 70) -> None:
    """Writes explorer.webp and overview.png.

    Args:
        model: A parallel model.
        out: Folder to write to; default: figures/ of the repository.
        quality: Of WebP.
    """
    out = out or data_folder().parent / "figures"
    loaded, coffee = load_model(model), sample_picture("coffee")
    part = server_of(loaded, coffee.crop(PART))
    style.write(overview(part, part.width * DRAWN[0] + DRAWN[1]), out, "overview", ("png",))
    page = explorer_page(server_of(loaded, coffee, reference_of(loaded)), "coffee")
    write_bytes(out / "explorer.webp", in_motion(page.text, quality))


if __name__ == "__main__":
    tyro.cli(main)
