"""How long coding takes, where the time goes and how much memory it takes: Table 2, beside CompressAI's models.

    python benchmarks/latency.py table --out data/results/latency.json
    python benchmarks/latency.py growth --out data/results/latency_growth.json

Weights are random; our models' latents are spread as those of a trained model, so that the coder has something to do.
All rows of a table come from one run on one machine; compare ratios, not seconds. Each model runs in a process of its
own, which gives its peak memory. Ours run as the command line runs them, with freed memory kept (`memory.py`);
CompressAI's run as they come, and once more with freed memory kept, where the system can do that (glibc, on Linux).
Their random weights do not matter: their coder's time hangs on the number of symbols.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from compressai.zoo import bmshj2018_hyperprior, mbt2018

from entroformer_lib.codec import codec
from entroformer_lib.codec.pictures import pad
from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import Entroformer, build_model
from entroformer_lib.errors import StudyError
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.stages import stage_times
from entroformer_lib.studies.results import save

OURS = ("base-parallel", "base-serial", "base-groupedmixer", "study-parallel", "study-serial", "study-groupedmixer")
COMPRESSAI = {"bmshj2018-hyperprior": bmshj2018_hyperprior, "mbt2018": mbt2018}
QUALITY = 8
KEPT = " + memory"  # behind the name of a CompressAI model that runs with freed memory kept
MODELS = (*OURS, *COMPRESSAI, *(name + KEPT for name in COMPRESSAI if sys.platform.startswith("linux")))
SIDES = (256, 512, 1024, 2048, 4096)  # pixels, for the growth of time and memory
STAGES = ("transforms", "hyper", "context", "entropy coding")  # of coding a picture


def timed(work: Callable[[], object]) -> tuple[dict[str, float], object]:
    """Seconds of some work and of its STAGES, as the columns of a table, and what the work returns.

    Returns:
        seconds; transforms_s, hyper_s, context_s, entropy_coding_s; other_s: the rest of seconds.
    """
    with stage_times() as stages:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
    columns = {f"{name.replace(' ', '_')}_s": stages.get(name, 0.0) for name in STAGES}
    return {"seconds": seconds, **columns, "other_s": seconds - sum(stages.values())}, result


def lively(model: Entroformer) -> Entroformer:
    """An untrained model with latents of a spread as in a trained one, so that the coder has something to do."""
    with torch.no_grad():
        model.g_a[-1].weight.mul_(40)
    return model.eval()


def measure(model: Entroformer, picture, data: bytes | None = None) -> tuple[dict, bytes]:
    """One encode, or one decode where there is `data`.  ->  the columns of `timed`, data"""
    if data is None:
        return timed(lambda: codec.encode(model, picture))
    return timed(lambda: codec.decode(data, model))[0], data


def measure_compressai(model, picture, data: dict | None = None) -> tuple[dict, dict]:
    """Seconds of CompressAI's compress, or of its decompress where there is `data`, with the transforms in it."""
    x = pad(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255, 64)
    with torch.inference_mode():
        start = time.perf_counter()
        if data is None:
            data = model.compress(x)
        else:
            model.decompress(**data)
        return {"seconds": time.perf_counter() - start}, data


def measure_one(name: str, width: int, height: int, repeats: int) -> list[dict]:
    """One row per direction and repeat: model, direction, width, height, seconds, peak_mb and, for ours, the stages.

    Where there are repeats, one run before them is not counted: it asks the system for memory that the others find.

    Raises:
        StudyError: a model of CompressAI that should run with freed memory kept, where the system cannot do that.
    """
    picture = sample_picture("astronaut").resize((width, height))
    plain_name = name.removesuffix(KEPT)
    kept = keep_freed_memory() if name not in COMPRESSAI else False
    if name.endswith(KEPT) and not kept:
        raise StudyError(f"'{name}' cannot be measured here: freed memory can be kept with glibc on Linux alone.")
    torch.manual_seed(0)
    if plain_name in COMPRESSAI:
        model = COMPRESSAI[plain_name](QUALITY, pretrained=False).eval()
        model.update(force=True)
        one = measure_compressai
    else:
        model, one = lively(build_model(name)), measure
        codec.decode(codec.encode(model, picture.resize((64, 64))), model)  # builds the integer copy of the weights
    rows, coded = [], None
    for direction in ("encode", "decode"):
        if repeats > 1:
            one(model, picture, coded)
        for repeat in range(repeats):
            row, data = one(model, picture, coded)
            size = dict(width=width, height=height)
            about = {"model": name, "direction": direction, "repeat": repeat, **size}
            rows.append({**about, **row, "peak_mb": peak_mb()})
        coded = data
    return rows


def peak_mb() -> float:
    """The largest memory of this process so far, weights and libraries included."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def in_own_process(name: str, width: int, height: int, repeats: int) -> list[dict]:
    """`measure_one` in a fresh process."""
    words = [sys.executable, __file__, "one", "--name", name]
    words += ["--width", str(width), "--height", str(height), "--repeats", str(repeats)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        size, memory = f"{width}x{height}", f"{row['peak_mb']:6.0f} MB"
        print(f"{name:28} {size} {row['direction']} {row['seconds']:8.3f} s {memory}", flush=True)
    return rows


def exponents(table: pd.DataFrame) -> dict[str, float]:
    """Exponents of a fit a * pixels^b through seconds and through memory above that of the smallest picture."""
    pixels = table.width * table.height
    extra = table.peak_mb - table.peak_mb.min()
    grown = extra > 0

    def exponent(values: pd.Series) -> float:
        return float(np.polyfit(np.log(pixels[values.index]), np.log(values), 1)[0])

    return {
        "seconds": exponent(table.seconds),
        "memory": exponent(extra[grown]) if grown.sum() > 1 else float("nan"),
    }


def table(
    out: str,
    models: tuple[str, ...] = MODELS,
    repeats: int = 5,
    width: int = 768,
    height: int = 512,
) -> None:
    """Times models on one picture and saves rows with their provenance.

    The first model runs once before, uncounted: a machine that was idle first has to collect its memory.

    Args:
        out: The JSON file.
        models: Names for `build_model`, and of CompressAI's bmshj2018-hyperprior and mbt2018 (quality 8).
        repeats: How often each is timed.
        width: Width of the picture in pixels; it is scikit-image's astronaut, scaled.
        height: Its height.
    """
    in_own_process(models[0], width, height, repeats)
    rows = [row for name in models for row in in_own_process(name, width, height, repeats)]
    save(Path(out), {"rows": rows}, threads=torch.get_num_threads())
    print(pd.DataFrame(rows).groupby(["model", "direction"]).seconds.median().unstack().round(3).to_string())


def growth(
    out: str,
    model: str = "study-parallel",
    sides: tuple[int, ...] = SIDES,
    large: str | None = "base-parallel",
) -> None:
    """Times one model on growing pictures, each once, and saves rows with exponents. To 4096 pixels it takes long.

    Args:
        out: The JSON file.
        model: Name for `build_model`.
        sides: Sides of the square pictures in pixels.
        large: The model for one picture of 3840x2160 pixels, for its memory; none leaves it out.
    """
    rows = [row for side in sides for row in in_own_process(model, side, side, 1)]
    uhd = in_own_process(large, 3840, 2160, 1) if large else []  # its checksum holds, or decoding stops
    found = exponents(pd.DataFrame(rows).query("direction == 'decode'"))
    print("exponents of decoding against pixels:", found)
    save(Path(out), {"rows": rows, "large": uhd, "exponents": found}, threads=torch.get_num_threads())


def _one(name: str, width: int, height: int, repeats: int) -> None:
    """Measures one model in this process and prints its rows."""
    print(json.dumps(measure_one(name, width, height, repeats)))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"table": table, "growth": growth, "one": _one})
