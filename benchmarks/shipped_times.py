"""Seconds that the shipped models take for one Kodak picture, encoding and decoding.

    python benchmarks/shipped_times.py --picture KODAK/kodim04.png --out data/results/shipped_times.json

On two threads, the median of repeats. On a quiet machine: nothing else may run.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from entroformer_lib.codec import codec
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.results import save
from entroformer_lib.weights.zoo import load_model

MODELS = ("blocks-parallel", "blocks-serial", "blocks-groupedmixer", "blocks-hyperprior")
LMBDAS, EFFORTS = (0.00035, 0.007, 0.12), (0, 8)


def seconds(work: Callable, repeats: int) -> float:
    """Median of repeats, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return round(statistics.median(found[1:]), 3)


def measure(picture: Path, out: Path, models: tuple[str, ...] = MODELS, repeats: int = 5, threads: int = 2) -> None:
    """Saves a row for each model, lambda and effort.

    Args:
        picture: A Kodak picture.
        out: The JSON file.
        models: Of variable rate.
        repeats: Of each measurement.
        threads: Of torch and of the compiled loops.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command line does
    rows, image = [], codec.open_picture(picture)
    for name in models:
        model = load_model(name, "cpu")
        for lmbda in LMBDAS:
            model.level = model.gain.level_of(lmbda)
            for effort in EFFORTS if name == models[0] else EFFORTS[:1]:
                data = codec.encode(model, image, effort=effort)
                row = {"model": name, "lmbda": lmbda, "effort": effort, "bytes": len(data)}
                row["encode_s"] = seconds(lambda m=model, e=effort: codec.encode(m, image, effort=e), repeats)
                row["decode_s"] = seconds(lambda m=model, d=data: codec.decode(d, m), repeats)
                rows.append(row)
                print(row, flush=True)
    save(out, {"picture": picture.name, "size": list(image.size), "rows": rows}, threads=threads)


if __name__ == "__main__":
    tyro.cli(measure)
