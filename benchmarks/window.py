"""What a search window costs in bits and saves in time, on large pictures.

    python benchmarks/window.py bits data/results/window_bits.json large/*.jpg
    python benchmarks/window.py times data/results/window_times.json --kodak kodak

Bits are those of whole files of photographs, by shipped weights. Times are of mosaics of Kodak's photographs, by a
model of the paper's size, whose weights are random ones that spread latents as trained ones do: the seams and the
weights make its bits mean nothing. Both save as they go.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from latency import lively
from PIL import Image

from benchmarks.latency import timed
from entroformer_lib.codec import codec
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.entroformer import build_model
from entroformer_lib.exact import loops, ranked
from entroformer_lib.files import data_folder
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.results import load, save
from entroformer_lib.weights.zoo import load_model

app = tyro.extras.SubcommandApp()
SIZES = ("768x512", "1920x1080", "2560x1440", "3840x2160")
WINDOWS = (None, 16, 32, 64)


def mosaic(tiles: list[Path], width: int, height: int) -> Image.Image:
    """Photographs side by side, 512 pixels of each."""
    picture, order = Image.new("RGB", (width, height)), itertools.cycle(tiles)
    for y, x in itertools.product(range(0, height, 512), range(0, width, 512)):
        picture.paste(Image.open(next(order)).convert("RGB").crop((0, 0, 512, 512)), (x, y))
    return picture


PARTS = {"linear_s": (loops, "linear"), "products_s": (ranked, "sums"), "ranking_s": (ranked, "in_threads")}


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds of the exact arithmetic's parts inside the block: linear layers; products of queries and keys; ranking,
    softmax and weighted sum, which are one loop."""
    seconds = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            function = getattr(module, name)

            def run(*args, part=part, function=function):
                start = time.perf_counter()
                result = function(*args)
                seconds[part] += time.perf_counter() - start
                return result

            stack.enter_context(patch.object(module, name, run))
        yield seconds


@app.command
def bits(
    out: tyro.conf.Positional[Path],
    pictures: tyro.conf.Positional[tuple[Path, ...]],
    *,
    model: str = "blocks-parallel@0.013",
    windows: tuple[int | None, ...] = (None, 8, 16, 32, 64),
) -> None:
    """Bytes of the file of each picture with each window; None is without. Given again, it goes on where it stopped."""
    coder, rows = load_model(model, "cpu"), (load(out) or {"rows": []})["rows"]
    done = {row["picture"] for row in rows}
    for path in pictures:
        if path.name in done:
            continue
        picture = Image.open(path).convert("RGB")
        for window in windows:
            coder.search_window = window
            size = len(codec.encode(coder, picture))
            rows.append({"picture": path.name, "width": picture.width, "height": picture.height, "window": window})
            rows[-1]["bytes"] = size
        save(out, {"model": model, "rows": rows}, coder)
        print(*rows[-len(windows) :], sep="\n", flush=True)


@app.command
def times(
    out: tyro.conf.Positional[Path],
    *,
    model: str = "base-parallel",
    windows: tuple[int | None, ...] = WINDOWS,
    sizes: tuple[str, ...] = SIZES,
    kodak: Path | None = None,
    threads: int = 2,
) -> None:
    """Seconds of an encode, and of a decode and its parts, of each size with each window; None is without.

    Of each size the first encode and decode do not count: they get their memory from the system.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    coder, rows = lively(build_model(model)), []
    tiles = sorted(p for p in files_under(kodak or data_folder() / "kodak") if is_picture(p))
    for size in ("320x320", *sizes):
        picture = mosaic(tiles, *map(int, size.split("x")))
        for number, window in enumerate((windows[0], *windows)):
            coder.search_window = window
            seconds, data = timed(lambda picture=picture: codec.encode(coder, picture))
            cpu = time.process_time()
            with clocked() as parts:
                row, _ = timed(lambda data=data: codec.decode(data, coder))
            row |= parts | {"cpu_s": time.process_time() - cpu, "encode_s": seconds["seconds"], "bytes": len(data)}
            if size in sizes and number:  # the first size compiles the loops
                rows.append({"width": picture.width, "height": picture.height, "window": window, **row})
                print(rows[-1], flush=True)
                save(out, {"model": model, "rows": rows}, threads=threads)


if __name__ == "__main__":
    app.cli()
