"""Memory of one process that codes many files: its peak after a few and after many, there and back.

python benchmarks/many_files.py --out data/results/many_files.json

The pictures are crops of scikit-image's photographs, in a few sizes that come again and again: whatever the first files
need, later ones need no more, so all growth is memory that is not given back.
"""

import shutil
import tempfile
import time
from pathlib import Path

import psutil
import tyro

from benchmarks.latency import peak_mb
from entroformer_lib.codec.many import Compress, Decompress, go_through, jobs_of
from entroformer_lib.datasets import SAMPLES, sample_picture
from entroformer_lib.studies import results


def write_pictures(folder: Path, count: int) -> None:
    """Crops of 64 to 160 pixels, no two alike."""
    folder.mkdir()
    photos = [sample_picture(name) for name in SAMPLES]
    for number in range(count):
        width, height = 64 + 32 * (number % 4), 64 + 32 * (number // 4 % 4)
        left, top = number * 7 % 200, number * 11 % 140
        crop = photos[number % len(photos)].crop((left, top, left + width, top + height))
        crop.save(folder / f"{number:04}.png")


def main(out: Path | None = None, model: str = "blocks-parallel", few: int = 50, many: int = 500) -> None:
    """Measures, prints, and writes the result with its provenance.

    Args:
        few: Files after which the memory is taken first.
        many: All files.
    """
    rows, folder = [], Path(tempfile.mkdtemp())
    try:
        write_pictures(folder / "photos", many)
        there = jobs_of([str(folder / "photos")], folder / "small", Compress(model))
        back = [(small, folder / "back" / f"{small.stem}.png") for _, small in there]
        for begin, end in ((0, few), (few, many)):  # the same process goes on
            start = time.monotonic()
            for work, jobs in ((Compress(model, device="cpu"), there), (Decompress(device="cpu"), back)):
                failed = [row for row in go_through(work, jobs[begin:end], 1) if "error" in row]
                assert not failed, failed
            now = psutil.Process().memory_info().rss / 1e6
            rows.append({"files": end, "peak_mb": peak_mb(), "now_mb": now, "seconds": time.monotonic() - start})
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    growth = rows[1]["peak_mb"] / rows[0]["peak_mb"] - 1
    print(f"The peak grew by {growth:.2%}.")
    if out is not None:
        results.save(out, {"rows": rows, "growth": growth, "model": model})


if __name__ == "__main__":
    tyro.cli(main)
