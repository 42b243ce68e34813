"""A model beyond Kodak: held-out photographs, scikit-image's, a chart and a page of coloured text, as real bytes.

    python benchmarks/other_pictures.py blocks-parallel --data DATA --out data/results/other_pictures.json

For photographs: BD-rates against JPEG, WebP and AVIF as Pillow writes them, per set of pictures, so that a model that
knows Kodak better than the rest of the world gives itself away. For graphics: PSNR at each rate, JPEG's with at least
as many bytes and colours that are not subsampled, and the bytes of a lossless WebP. `DATA` holds train/ and kodak/.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tyro.conf import Positional

from entroformer_lib.datasets import fetch
from entroformer_lib.files import data_folder
from entroformer_lib.studies import bd
from entroformer_lib.studies.classical import available, jpeg_psnr_db
from entroformer_lib.studies.measuring import finished_rows, means, measure, tasks_of
from entroformer_lib.studies.results import save
from entroformer_lib.training.data import pictures_in, read_names
from entroformer_lib.weights.zoo import load_model

ANCHORS = tuple(name for name in ("jpeg", "webp", "avif") if available(name))
COLOURS = ("#d00000", "#0050d0", "#008030", "#c000c0", "#e08000", "#000000")


def chart(path: Path) -> None:
    """Bars and curves in saturated colours, drawn by matplotlib: 640 x 480."""
    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2)
    x = np.linspace(0, 6, 200)
    bars.bar(range(6), [3, 7, 5, 9, 4, 6], color=COLOURS)
    for i, colour in enumerate(COLOURS[:4]):
        curves.plot(x, np.sin(x + i), color=colour, label=f"series {i + 1}")
    curves.legend()
    curves.grid()
    figure.savefig(path)


def page(path: Path) -> None:
    """Lines of text in many colours on white: 640 x 480."""
    image = Image.new("RGB", (640, 480), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    text = "Latents are coded in two passes; the second sees all of the first."
    for i, top in enumerate(range(8, 470, 22)):
        draw.text((12, top), f"{i + 1:2}  {text}", fill=COLOURS[i % len(COLOURS)], font=font)
    image.save(path)


def others(path: Path, size: int) -> dict:
    """What other formats do with a drawn picture."""
    lossless = io.BytesIO()
    Image.open(path).convert("RGB").save(lossless, "webp", lossless=True, quality=100, method=6)
    jpeg = jpeg_psnr_db(path, size, subsampling="4:4:4")
    return {"jpeg_psnr_db": jpeg, "webp_lossless_bytes": len(lossless.getvalue())}


def sets_of(data: Path, folder: Path) -> dict[str, list[Path]]:
    """Photographs by set, as files."""
    names = read_names(data_folder() / "reference" / "held_out.txt")
    held_out = folder / "held-out"
    held_out.mkdir()
    for i, (_, picture) in enumerate(pictures_in(str(data / "train"), names.__contains__)):
        Image.fromarray(picture).save(held_out / f"{i:02}.png")
    return {
        "Kodak": sorted((data / "kodak").glob("*.png")),
        "held out of training": sorted(held_out.glob("*.png")),
        "scikit-image": fetch("samples", folder / "samples"),
    }


def main(model: Positional[str], data: Path, out: Path) -> None:
    """Measures and writes the result.

    Args:
        model: A model of variable rate, by name or file.
        data: Folder with train/ and kodak/.
        out: The result's file.
    """
    with tempfile.TemporaryDirectory() as scratch, finished_rows(out) as done:
        folder, rates, points = Path(scratch), [], {}
        for name, paths in sets_of(data, folder).items():
            tasks = [task for codec in (model, *ANCHORS) for task in tasks_of(codec, paths)]
            points[name] = means(measure(tasks, done))
            ours, *theirs = (bd.curve_of(pd.DataFrame(points[name]), codec) for codec in (model, *ANCHORS))
            for anchor in theirs:
                found = bd.compare(ours, anchor)
                rates.append({"pictures": name, "count": len(paths), "anchor": anchor.label, **_numbers(found)})
                print(f"{name:22} {found}", flush=True)
        graphics = []
        for draw in (chart, page):
            path = folder / f"{draw.__name__}.png"
            draw(path)
            for row in measure(tasks_of(model, [path]), done):
                graphics.append({**row, **others(path, row["bytes"])})
                print(draw.__name__, row["setting"], f"{row['bpp']:.2f} bpp {row['psnr_db']:.1f} dB", flush=True)
        result = {"rates": rates, "points": points, "graphics": graphics}
        save(out, result, load_model(model.partition("@")[0], "cpu"))


def _numbers(found: bd.Bjontegaard) -> dict:
    return {name: getattr(found, name) for name in ("rate_percent", "quality_db", "low", "high", "method")}


if __name__ == "__main__":
    tyro.cli(main)
